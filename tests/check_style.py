"""Lines that can be read: ruff's rules and a few of our own, for notebooks, tests and benchmarks.

python tests/check_style.py             check; a file that is not in style_debt.json must be clean
python tests/check_style.py FILE ...    every finding in these files, with its place
python tests/check_style.py --write     store the counts that have fallen
python tests/check_style.py --accept    store all counts, also those that have risen (after a merge of older work)

`tests/style_debt.json` holds what is left to clean: file -> rule -> how often. Counts may only fall.
"""
import ast
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
DEBT = ROOT/'tests'/'style_debt.json'
SHOWN_WIDTH = 100   # columns of a cell that readers see; ruff judges the rest by 120
LEAD_WIDTH = 113    # of a page's first quoted line, which becomes the first line of its module
CELL_STATEMENTS = 40    # statements in an exported cell, its definitions and docstrings too: a cell holds one idea
RUFF = [str(Path(sys.executable).with_name('ruff')), 'check', '--output-format', 'json', '--exit-zero']

ADVICE = {
    'nested-ternary': 'write `if` and `else` as statements, or a function with a name',
    'wide-cell': f'a cell that is shown has at most {SHOWN_WIDTH} columns',
    'lead': f'the first quoted line of a page is whole sentences within {LEAD_WIDTH} columns: say the rest in a second',
    'long-cell': f'an exported cell has at most {CELL_STATEMENTS} statements: divide it',
}


class Finding(NamedTuple):
    "One place that is not clean."
    file: str
    rule: str
    place: str
    words: str


def files():
    "Notebooks, tests, benchmarks and the like: all that is written by hand."
    patterns = ('nbs/**/*.ipynb', 'tests/*.py', 'benchmarks/*.py', 'docs/*.py', 'opentrans/**/__init__.py', 'setup.py')
    found = [path for pattern in patterns for path in ROOT.glob(pattern)]
    return [path for path in sorted(found) if '.ipynb_checkpoints' not in path.parts]


def ruff_findings(paths):
    "What ruff finds, by the rules of ruff.toml."
    run = subprocess.run([*RUFF, *map(str, paths)], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f'ruff did not run: {run.stderr.strip()}')
    for found in json.loads(run.stdout):
        cell = f"cell {found['cell']}:" if found.get('cell') else ''
        place = f"{cell}{found['location']['row']}"
        file = Path(found['filename']).relative_to(ROOT).as_posix()
        yield Finding(file, found['code'] or 'syntax', place, found['message'])


def code_cells(path):
    "The code cells of a notebook, with ruff's number of each; the lines of magics are empty."
    for number, cell in enumerate(json.loads(path.read_text(encoding='utf-8'))['cells'], 1):
        if cell['cell_type'] != 'code':
            continue
        lines = ''.join(cell['source']).split('\n')
        yield number, ['' if line.lstrip().startswith(('%', '!')) else line for line in lines]


def pieces(path):
    "The Python of a file as (name of the place, lines)."
    if path.suffix == '.ipynb':
        return [(f'cell {number}:', lines) for number, lines in code_cells(path)]
    return [('', path.read_text(encoding='utf-8').split('\n'))]


def directives(lines):
    "The nbdev directives of a cell, such as `export`, `hide` or `eval`."
    found = [line.replace(' ', '')[2:] for line in lines if line.startswith('#|')]
    return {words.split(':')[0] for words in found}


def nested_ternaries(lines):
    "Line numbers of conditional expressions inside conditional expressions."
    for node in ast.walk(ast.parse('\n'.join(lines))):
        if not isinstance(node, ast.IfExp):
            continue
        inner = (sub for part in (node.test, node.body, node.orelse) for sub in ast.walk(part))
        if any(isinstance(sub, ast.IfExp) for sub in inner):
            yield node.lineno


def statements(lines):
    "How many statements a piece has, those inside others too."
    return sum(isinstance(node, ast.stmt) for node in ast.walk(ast.parse('\n'.join(lines))))


def lead(path):
    "The first quoted line under the title of a notebook, which nbdev makes the docstring of its module; or ''."
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        if cell['cell_type'] == 'markdown':
            found = re.search(r'^# .*\n+> +(.*)', ''.join(cell['source']), re.M)
            return found.group(1) if found else ''
    return ''


def own_findings(path):
    "What ruff has no rule for."
    file = path.relative_to(ROOT).as_posix()
    first = lead(path) if path.suffix == '.ipynb' else ''
    if first and (len(first) > LEAD_WIDTH or first[-1] not in '.?!'):
        yield Finding(file, 'lead', first, ADVICE['lead'])
    for place, lines in pieces(path):
        for row in nested_ternaries(lines):
            yield Finding(file, 'nested-ternary', f'{place}{row}', ADVICE['nested-ternary'])
        if path.suffix != '.ipynb':
            continue
        marks = directives(lines)
        if 'export' in marks and statements(lines) > CELL_STATEMENTS:
            yield Finding(file, 'long-cell', place, ADVICE['long-cell'])
        if not marks & {'export', 'exporti', 'hide'}:
            wide = [row for row, line in enumerate(lines, 1) if SHOWN_WIDTH < len(line) <= 120]
            for row in wide:
                yield Finding(file, 'wide-cell', f'{place}{row}', ADVICE['wide-cell'])


def findings(paths=None):
    "Everything that is not clean, in files that are given or in all."
    paths = files() if paths is None else [Path(path).resolve() for path in paths]
    found = [*ruff_findings(paths), *(one for path in paths for one in own_findings(path))]
    return sorted(found, key=lambda finding: finding.file)


def counted(found):
    "File -> rule -> how often."
    counts = {}
    for (file, rule), number in sorted(Counter((one.file, one.rule) for one in found).items()):
        counts.setdefault(file, {})[rule] = number
    return counts


def compared(now, debt):
    "Counts that have risen and counts that have fallen, as (file, rule, before, now)."
    keys = sorted({(file, rule) for counts in (now, debt) for file in counts for rule in counts[file]})
    rows = [(file, rule, debt.get(file, {}).get(rule, 0), now.get(file, {}).get(rule, 0)) for file, rule in keys]
    return [row for row in rows if row[3] > row[2]], [row for row in rows if row[3] < row[2]]


def lowered(now, debt):
    "The debt after what has fallen is taken off; what has risen stays at its old count."
    kept = {file: {rule: min(number, debt.get(file, {}).get(rule, 0)) for rule, number in rules.items()}
            for file, rules in now.items()}
    kept = {file: {rule: number for rule, number in rules.items() if number} for file, rules in kept.items()}
    return {file: rules for file, rules in kept.items() if rules}


def as_text(debt):
    "The debt as JSON, a file a line, so that merges see files."
    rows = [f' {json.dumps(file)}: {json.dumps(rules)}' for file, rules in sorted(debt.items())]
    return '{\n' + ',\n'.join(rows) + '\n}\n'


def shown(finding):
    return f'{finding.file}:{finding.place} {finding.rule} {finding.words}'


def main(argv):
    named = [word for word in argv if not word.startswith('--')]
    found = findings(named or None)
    if named:
        print('\n'.join(map(shown, found)) or 'clean')
        return bool(found)
    now = counted(found)
    debt = json.loads(DEBT.read_text(encoding='utf-8')) if DEBT.exists() else {}
    if '--accept' in argv or '--write' in argv:
        debt = now if '--accept' in argv else lowered(now, debt)
        DEBT.write_text(as_text(debt), encoding='utf-8')
    risen, fallen = compared(now, debt)
    for file, rule, before, after in risen:
        print(f'{file}: {rule} {after} times, allowed {before}')
        print(*(f'   {shown(one)}' for one in found if (one.file, one.rule) == (file, rule)), sep='\n')
    left = sum(number for rules in debt.values() for number in rules.values())
    print(f'{len(debt)} files have {left} places left to clean.')
    if fallen:
        print(f'{len(fallen)} counts have fallen: python tests/check_style.py --write stores them.')
    return bool(risen)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
