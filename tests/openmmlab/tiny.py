"""The smallest model and Runner that mmengine accepts, with one WS convolution and one BCN."""

import itertools

import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

from wsbcn_mm import BatchChannelNorm2d, WSConv2d

_numbers = itertools.count()


class TinyModel(BaseModel):
    def __init__(self):
        super().__init__()
        self.conv = WSConv2d(3, 8, 3, bias=False)
        self.bcn = BatchChannelNorm2d(8, 2)
        self.head = nn.Conv2d(8, 1, 1)

    def forward(self, inputs, mode='tensor'):
        output = self.head(self.bcn(self.conv(torch.stack(list(inputs)))))
        return dict(loss=(output - 1).square().mean()) if mode == 'loss' else output


def tiny_model(fill=None):
    """The model; every floating-point tensor of it has the value ``fill`` where that is given."""
    model = TinyModel()
    if fill is not None:
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.fill_(fill)
    return model


def make_runner(work_dir, epochs=1, **kwargs):
    """A Runner on the CPU: two iterations an epoch, a checkpoint after each epoch."""
    data = [dict(inputs=torch.randn(3, 6, 6) + 1) for _ in range(2)]
    return Runner(
        tiny_model(),
        str(work_dir),
        train_dataloader=dict(
            dataset=data, batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler')
        ),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9)),
        param_scheduler=dict(type='MultiStepLR', milestones=[5]),
        experiment_name=f'tiny_{next(_numbers)}',
        **{'log_level': 'ERROR', **kwargs},
    )
