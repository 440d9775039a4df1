"""Former name of `wsbcn_mm.openmmlab.datasets.shapes_coco`, which older configs import."""

from wsbcn_mm.openmmlab.datasets.shapes_coco import ShapesCocoDataset  # noqa: F401
