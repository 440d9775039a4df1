"""The drawn data set, registered with the hosts."""
