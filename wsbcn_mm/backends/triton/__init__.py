"""Placeholder."""
def unavailable():
    return 'not there yet'
def supports(x):
    return 'not there yet'
