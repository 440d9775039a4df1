# Weight Standardization and Batch-Channel Normalization with running estimates: what each
# normalised place of a model gets.
norm = dict(type='BCN', num_groups=32)
conv = dict(type='WSConv2d')
