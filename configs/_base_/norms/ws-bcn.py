# Weight Standardization and Batch-Channel Normalization with running estimates: what each
# normalised place of a model gets.
norm = dict(type='BCN', num_groups=32)
conv = dict(type='WSConv2d')
# The same estimates on all ranks; their rate, above the weight of one image, follows the images of
# a step. See wsbcn_mm/openmmlab/hooks/estimates.py.
custom_hooks = [dict(type='EstimatesHook')]
