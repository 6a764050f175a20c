"""Types of the public surface, by basedpyright: every name of `opentrans.__all__`, with its methods and fields.

python tests/check_types.py             check; a name that is not in types_debt.json must have all its types
python tests/check_types.py NAME ...    what is missing in names such as SparseMask or imp
python tests/check_types.py --write     store what is left, once some of it has gone

`tests/types_debt.json` lists the names that lack a type today. It may only become shorter.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEBT = ROOT/'tests'/'types_debt.json'
PYRIGHT = str(Path(sys.executable).with_name('basedpyright'))
COMMAND = [PYRIGHT, '--verifytypes', 'opentrans', '--ignoreexternal', '--outputjson']


def symbols():
    "Everything that a user can reach, as basedpyright sees it."
    # an editable installation alone it does not see, and torch only where `python` is this interpreter
    path = os.pathsep.join([str(Path(PYRIGHT).parent), os.environ.get('PATH', '')])
    place = dict(os.environ, PYTHONPATH=str(ROOT), PATH=path)
    run = subprocess.run(COMMAND, cwd=ROOT, env=place, capture_output=True, text=True)
    if not run.stdout.startswith('{'):
        sys.exit(f'basedpyright did not run: {run.stderr.strip() or run.stdout.strip()}')
    found = json.loads(run.stdout)['typeCompleteness']['symbols']
    if len(found) < 1000:
        sys.exit(f'basedpyright sees {len(found)} symbols of opentrans: it did not find the package whole.')
    return found


def public_name(symbol, public):
    "The public name that a symbol belongs to, with its method or field; None for one of no public name."
    parts = symbol.split('.')
    for at, part in enumerate(parts):
        if part in public and at > 0:
            return '.'.join(parts[at:])
    return None


def missing(public):
    "Public name -> what basedpyright says of its types."
    found = {}
    for symbol in symbols():
        name = public_name(symbol['name'], public)
        if name is None or symbol['isTypeKnown'] or not symbol['isExported']:
            continue
        told = [one['message'].split('\n')[0] for one in symbol['diagnostics']]
        found.setdefault(name, []).extend(told)
    return found


def main(argv):
    sys.path.insert(0, str(ROOT))
    import opentrans
    found = missing(set(opentrans.__all__))
    named = [word for word in argv if not word.startswith('--')]
    if named:
        rows = [(name, told) for name, told in found.items() if name.split('.')[0] in named]
        print('\n'.join(f'{name}: {line}' for name, told in rows for line in told) or 'all typed')
        return bool(rows)
    debt = set(json.loads(DEBT.read_text(encoding='utf-8'))) if DEBT.exists() else set(found)
    new = sorted(set(found) - debt)
    if '--write' in argv:
        DEBT.write_text(json.dumps(sorted(debt.intersection(found)), indent=1) + '\n', encoding='utf-8')
    for name in new:
        print(f"{name} lacks a type: {'; '.join(found[name])}")
    print(f'{len(found)} of the public names, methods and fields lack a type.')
    if debt - set(found) and '--write' not in argv:
        print(f'{len(debt - set(found))} are complete now: python tests/check_types.py --write stores that.')
    return bool(new)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
