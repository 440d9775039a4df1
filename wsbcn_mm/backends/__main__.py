"""``python -m wsbcn_mm.backends`` prints which backends can be used here, and why not."""

from wsbcn_mm.backends import report

if __name__ == '__main__':
    print(report())
