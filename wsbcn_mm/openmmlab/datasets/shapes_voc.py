"""The embedded dataset for MMSegmentation: drawn when it is first asked for."""

from pathlib import Path

from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

from wsbcn_mm import shapes


@DATASETS.register_module()
class ShapesVOCDataset(BaseSegDataset):
    """`wsbcn_mm.shapes` in PASCAL VOC layout; class 0 is the background.

    Args:
        data_root: The folder ``VOCdevkit/VOC2012`` of the dataset; where the dataset's own folder,
            two above, does not exist, it is drawn there first (seconds; safe for several processes
            at once).
        ann_file: The list of image names, relative to ``data_root``.
        **kwargs: Those of BaseSegDataset.
    """

    METAINFO = dict(classes=('background', *shapes.CLASSES), palette=list(shapes.PALETTE))

    def __init__(
        self, *args, ann_file: str, data_root: str = 'data/shapes/VOCdevkit/VOC2012', **kwargs
    ) -> None:
        shapes.draw_dataset(Path(data_root).parents[1])
        super().__init__(
            *args,
            ann_file=ann_file,
            data_root=data_root,
            img_suffix='.jpg',
            seg_map_suffix='.png',
            **kwargs,
        )
