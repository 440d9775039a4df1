"""The embedded pictures for MMPretrain: drawn when they are first asked for."""

from mmpretrain.datasets import CustomDataset
from mmpretrain.registry import DATASETS

from wsbcn_mm.shapes import pictures


@DATASETS.register_module()
class ShapesPicturesDataset(CustomDataset):
    """`wsbcn_mm.shapes.pictures`, a folder for each class; the arguments are CustomDataset's.

    Args:
        data_root: The folder of the data set; where it does not exist, the data set is drawn there
            first (seconds; safe for several processes at once).
    """

    def __init__(self, *args, data_root: str = 'data/pictures', **kwargs) -> None:
        pictures.draw_pictures(data_root)
        super().__init__(*args, data_root=data_root, **kwargs)
