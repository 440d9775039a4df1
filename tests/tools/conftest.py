"""Tools are scripts: their folders go onto the path, as python puts them there."""

import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[2] / 'tools'
sys.path[:0] = [
    str(TOOLS / folder) for folder in ('', 'benchmark', 'dev', 'analysis_tools', 'study')
]
