# As ws-bcn, with the statistics of the whole batch instead of running estimates, as the authors
# train segmentation: the inner BN becomes a SyncBatchNorm over all GPUs (in a single process it
# sees that process's images).
norm = dict(type='BCN', num_groups=32, mode='batch')
conv = dict(type='WSConv2d')
sync_bn = 'torch'
