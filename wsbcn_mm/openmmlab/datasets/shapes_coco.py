"""The embedded dataset for MMDetection: drawn when it is first asked for."""

from pathlib import Path

from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS

from wsbcn_mm import shapes


@DATASETS.register_module()
class ShapesCocoDataset(CocoDataset):
    """`wsbcn_mm.shapes` in COCO layout; the arguments are CocoDataset's.

    Args:
        data_root: The folder ``coco`` of the dataset; where its parent does not exist, the dataset
            is drawn there first (seconds; safe for several processes at once).
    """

    METAINFO = dict(classes=shapes.CLASSES, palette=list(shapes.PALETTE[1:]))

    def __init__(self, *args, data_root: str = 'data/shapes/coco', **kwargs) -> None:
        shapes.draw_dataset(Path(data_root).parent)
        super().__init__(*args, data_root=data_root, **kwargs)
