"""State dicts of exactly the layouts that others publish, built: the files are not here."""

import torch

BLOCKS = {'50': (3, 4, 6, 3), '101': (3, 4, 23, 3)}


def resnet(depth='50', norm=None, groups=1, width=64, shape=None):
    """Keys and (zero-filled) tensors of a torchvision-like ResNet: convolutions, norms, classifier.

    ``norm(name, channels)`` gives the tensors of a norm. ``shape`` makes the tensors.
    """
    make = shape or torch.zeros
    state = {'conv1.weight': make(width, 3, 7, 7), **norm('bn1', width)}
    channels = width
    for stage, blocks in enumerate(BLOCKS[depth], 1):
        out = 4 * width * 2 ** (stage - 1)
        inner = out // 4 if groups == 1 else out // 2
        for block in range(blocks):
            at = f'layer{stage}.{block}'
            convs = [(inner, channels, 1), (inner, inner // groups, 3), (out, inner, 1)]
            for i, (o, c, k) in enumerate(convs, 1):
                state[f'{at}.conv{i}.weight'] = make(o, c, k, k)
                state |= norm(f'{at}.bn{i}', o)
            if block == 0:
                state[f'{at}.downsample.0.weight'] = make(out, channels, 1, 1)
                state |= norm(f'{at}.downsample.1', out)
            channels = out
    state |= {'fc.weight': make(1000, channels), 'fc.bias': make(1000)}
    return state


def statistics(name, channels):
    return {
        f'{name}.running_mean': torch.zeros(channels),
        f'{name}.running_var': torch.ones(channels),
        f'{name}.num_batches_tracked': torch.tensor(7),
    }


def affine(name, channels):
    return {f'{name}.weight': torch.zeros(channels), f'{name}.bias': torch.zeros(channels)}


def authors_bcn(name, channels):
    return {
        f'{name}.weight': torch.randn(1, 32, 1),
        f'{name}.bias': torch.randn(1, 32, 1),
        **affine(f'{name}.pbn', channels),
        **statistics(f'{name}.pbn', channels),
    }


def batch_norm(name, channels):
    return affine(name, channels) | statistics(name, channels)


def module(state):
    """As saved by DataParallel."""
    return {f'module.{key}': value for key, value in state.items()}
