"""From any config of OpenMMLab to one with WS + BCN."""
