"""Pages: what they name is there, what they report stands somewhere."""

import pkgutil
import re
from pathlib import Path

import pytest

yaml = pytest.importorskip('yaml', reason='the metafiles are YAML')

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(path.parent.name for path in (ROOT / 'configs').glob('*/metafile.yml'))


def page_of(folder: str) -> str:
    return (ROOT / 'configs' / folder / 'README.md').read_text()


def reported(folder: str) -> set[tuple[str, ...]]:
    """(config, numbers..., source) of what the metafile says that others reported."""
    models = yaml.safe_load((ROOT / 'configs' / folder / 'metafile.yml').read_text())['Models']
    return {
        (model['Name'], *(str(v) for k, v in entry.items() if k != 'Source'), entry['Source'])
        for model in models
        for entry in (model.get('Metadata') or {}).get('Reported elsewhere', [])
    }


def test_the_readme_counts_the_configs():
    there = [p for p in (ROOT / 'configs').rglob('*.py') if '_base_' not in p.parts]
    assert f'\n{len(there)} configs, each' in (ROOT / 'README.md').read_text()


@pytest.mark.parametrize('folder', FOLDERS)
def test_the_page_of_a_folder_of_configs(folder):
    text = page_of(folder)
    assert '## Run\n' in text and '**Measured here' in text and '**Reported elsewhere' in text
    named = set(re.findall(r'configs/[\w./+-]+\.py', text))
    assert named and all((ROOT / path).is_file() for path in named)
    for target in re.findall(r'\]\(([^)#]+)(?:#[^)]*)?\)', text):
        assert target.startswith('https:') or (ROOT / 'configs' / folder / target).exists(), target
    rows = text.partition('**Reported elsewhere**')[2].splitlines()
    cells = [
        [c.strip() for c in row.strip('|').split('|')] for row in rows if row.startswith('| [')
    ]
    assert {(re.match(r'\[(.*)\]', name)[1], *rest) for name, *rest in cells} == reported(folder)


def test_what_the_page_of_the_quick_configs_measured_stands_in_the_logs():
    rows = re.findall(r'^\| \[quick_.*$', page_of('quick'), re.MULTILINE)
    assert len(rows) == 6
    for row in rows:
        minutes, result, log = (cell.strip() for cell in row.strip('|').split('|')[2:])
        lines = (ROOT / 'configs/quick' / re.search(r'\((.*)\)', log)[1]).read_text()
        for name, value in re.findall(r'([\w -]+) (0\.\d+)', result):
            assert re.search(rf'^ *{name.strip()} +{value}$', lines, re.MULTILINE)
        assert re.search(rf'^ *training +{minutes}$', lines, re.MULTILINE)


def test_the_table_of_tools_has_every_tool_once():
    text = (ROOT / 'tools' / 'README.md').read_text()
    rows = [row for row in text.splitlines() if row.startswith('| `')]
    listed = [
        name for row in rows for name in re.findall(r'`([\w/]+\.(?:py|sh))', row.split(' | ')[0])
    ]
    scripts = {
        path.relative_to(ROOT / 'tools').as_posix()
        for path in (ROOT / 'tools').rglob('*')
        if path.suffix == '.sh' or (path.suffix == '.py' and '__main__' in path.read_text())
    }
    assert len(listed) == len(set(listed)) and set(listed) == scripts


PAGES = sorted(
    page
    for folder in ('.', 'docs', 'docs/study', 'tools', 'configs/*')
    for page in ROOT.glob(f'{folder}/*.md')
)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_pages_lead_somewhere(page):
    """Also to headings, as the site and the usual hosts name them."""
    text = re.sub(r'^```.*?^```', '', page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r'\]\(([^()\s]+)\)', text):
        if target.startswith('https:'):
            continue
        path, _, anchor = target.partition('#')
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r'^#+ (.*)$', file.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r'[^\w -]', '', h).lower().replace(' ', '-') for h in headings}


def inline_code(page: Path) -> str:
    """What stands between backquotes; blocks are run by tests/test_snippets.py."""
    text = re.sub(r'^```.*?^```', '', page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return '\n'.join(re.findall(r'`([^`\n]+)`', text))


# What is named and is of others: ruff's, MMAction2's.
OF_OTHERS = {'--check', 'requirements/optional.txt'}


@pytest.fixture(scope='module')
def sources() -> str:
    files = [ROOT / 'setup.py', ROOT / '.ci' / 'run', ROOT / 'tests' / 'conftest.py']
    files += [p for folder in ('wsbcn_mm', 'tools') for p in (ROOT / folder).rglob('*.[ps][yh]')]
    return '\n'.join(file.read_text() for file in files)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_names_in_passing_is_there(page, sources):
    """Options, variables of the environment, names of the package, files, tests."""
    code = inline_code(page)
    for option in set(re.findall(r'(?<![\w-])--[a-z][\w-]+', code)) - OF_OTHERS:
        assert re.search(rf'(?<![\w-]){option}(?![\w-])', sources), option
    for variable in set(re.findall(r'WSBCN_\w+', page.read_text())):
        assert re.search(rf'\b{variable}\b', sources), variable
    for name in set(re.findall(r'\bwsbcn_mm(?:\.\w+)+', code)):
        pkgutil.resolve_name(name)
    folders = 'tools|tests|configs|docs|wsbcn_mm|requirements|demo'
    for path in set(re.findall(rf'\b(?:{folders})/[\w./+-]*\w', code)) - OF_OTHERS:
        assert (ROOT / path).exists(), path
    for name in set(re.findall(r'(?<![/\w])test_\w+(?!\w|\.)', code)):
        tests = (ROOT / 'tests').rglob('test_*.py')
        assert any(f'def {name}(' in file.read_text() for file in tests), name
