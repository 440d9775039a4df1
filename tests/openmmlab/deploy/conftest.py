"""Trained models, and files of them, for the tests of deployment."""

import pytest


@pytest.fixture(scope='package', autouse=True)
def one_block_per_stage():
    """Networks of 18 layers are half as deep here: exporters take their time for every layer."""
    from tests.openmmlab.deploy.models import one_block_per_stage

    with one_block_per_stage():
        yield


@pytest.fixture(scope='package', params=['mask_rcnn', 'deeplabv3'])
def trained(request, one_block_per_stage):
    """The quick model of one kind, its config and its plan; not to be changed."""
    import torch

    from tests.openmmlab.deploy.models import QUICK, SIZE, as_trained
    from wsbcn_mm import folding
    from wsbcn_mm.openmmlab import config
    from wsbcn_mm.openmmlab.deploy import inference

    torch.manual_seed(0)
    cfg = config.load_config(str(QUICK[request.param]))
    model = as_trained(inference.build_model(cfg))
    plan = folding.plan(model, run=inference.run_on(cfg, inference.random_image(*SIZE)))
    return cfg, model, plan


@pytest.fixture(scope='package')
def folder(tmp_path_factory, one_block_per_stage):
    """Random models as checkpoints, and a few drawn images."""
    import torch
    from PIL import Image

    from tests.openmmlab.deploy.models import LISTED, QUICK, as_trained
    from wsbcn_mm import shapes
    from wsbcn_mm.openmmlab import config
    from wsbcn_mm.openmmlab.deploy import inference

    folder = tmp_path_factory.mktemp('deploy')
    (folder / 'images/inner').mkdir(parents=True)
    for i, name in enumerate(('a.png', 'b.jpg', 'inner/a.png')):
        Image.fromarray(shapes.draw_image('val', i)[0]).save(folder / 'images' / name)
    for name, file in QUICK.items():
        torch.manual_seed(0)
        model = as_trained(inference.build_model(config.load_config(str(file))))
        if name == 'mask_rcnn':  # scores above the threshold: something to find
            model.roi_head.bbox_head.fc_cls.weight.data *= 40
        classes = shapes.CLASSES if name == 'mask_rcnn' else ('background', *shapes.CLASSES)
        colours = shapes.PALETTE[1:] if name == 'mask_rcnn' else shapes.PALETTE
        meta = dict(dataset_meta=dict(classes=classes, palette=list(colours)), cfg='wsbcn_mm')
        torch.save(dict(state_dict=model.state_dict(), meta=meta), folder / f'{name}.pth')
    shapes.draw_dataset(folder / 'data', 1, 2, (96, 64))
    for name, text in LISTED.items():
        (folder / f'{name}.py').write_text(text)
        torch.manual_seed(0)
        model = as_trained(inference.build_model(config.load_config(f'{folder}/{name}.py')))
        torch.save(dict(state_dict=model.state_dict(), meta={}), folder / f'{name}.pth')
    return folder
