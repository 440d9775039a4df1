# Group Normalization: what each normalised place of a model gets.
norm = dict(type='GN', num_groups=32)
conv = None
