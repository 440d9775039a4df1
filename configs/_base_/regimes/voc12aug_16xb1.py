# PASCAL VOC 2012 aug (10,582 training images, the authors' set) at 16 GPUs x 1 image.
_base_ = './voc12_16xb1.py'
voc = dict(
    type='PascalVOCDataset',
    data_root='data/VOCdevkit/VOC2012',
    pipeline={{_base_.train_pipeline}},
)
train_dataloader = dict(
    dataset=dict(
        _delete_=True,  # the base's keys of a single dataset
        type='ConcatDataset',
        datasets=[
            dict(
                ann_file='ImageSets/Segmentation/train.txt',
                data_prefix=dict(img_path='JPEGImages', seg_map_path='SegmentationClass'),
                **voc,
            ),
            dict(
                ann_file='ImageSets/Segmentation/aug.txt',
                data_prefix=dict(img_path='JPEGImages', seg_map_path='SegmentationClassAug'),
                **voc,
            ),
        ],
    )
)
