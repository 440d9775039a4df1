"""docs/guarantees.md names tests that exist."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / 'docs' / 'guarantees.md'


def test_every_row_names_tests_that_exist():
    rows = [line for line in PAGE.read_text().splitlines() if re.match(r'\| (?!feature)', line)]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r'`(tests/[\w/]+\.py)::(test_\w+)`', row)
        assert named or 'not tried in the tests' in row, row
        for path, name in named:
            assert f'def {name}(' in (REPOSITORY / path).read_text(), f'{path}::{name}'
