"""From any config of OpenMMLab to one with WS + BCN, and what is wrong with a config."""
