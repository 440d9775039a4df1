"""Former name of `wsbcn_mm.openmmlab.datasets.shapes_voc`, which older configs import."""

from wsbcn_mm.openmmlab.datasets.shapes_voc import ShapesVOCDataset  # noqa: F401
