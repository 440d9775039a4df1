"""What the hosts do not say of a data set: what it lacks, and what is quietly lost of it."""
