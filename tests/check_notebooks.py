"""The notebooks are the source: fail if exporting or cleaning them, or rendering the index, would change a
committed file.

python tests/check_notebooks.py            check
python tests/check_notebooks.py --write    render nbs/index.ipynb to README.md (in place of quarto, which nbdev
would use)
"""
import json, re, shutil, subprocess, sys, tempfile
from pathlib import Path

root = Path(__file__).resolve().parent.parent
tools = Path(sys.executable).parent

def files(folder, *patterns):
    return {str(p.relative_to(folder)): p.read_bytes() for g in patterns
            for p in sorted(folder.glob(g)) if '.ipynb_checkpoints' not in p.parts}

def changed(patterns, command):
    "Names of the files that `command` changes, run in a copy of the repository."
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp)/root.name
        copy.mkdir()
        shutil.copy(root/'settings.ini', copy)
        for part in ('nbs', 'opentrans'):
            shutil.copytree(root/part, copy/part,
                            ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
        subprocess.run([str(tools/command[0]), *command[1:]], cwd=copy, check=True)
        old,new = files(root, *patterns),files(copy, *patterns)
        return sorted(n for n in {*old, *new} if old.get(n) != new.get(n))

def readme():
    "The index as markdown: text as it stands, and what the shown cells output as markdown."
    parts = []
    for cell in json.loads((root/'nbs'/'index.ipynb').read_text())['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown': parts.append(re.sub(r'^---\n.*?\n---\n', '', source, flags=re.S))
        elif cell['cell_type'] == 'code' and '#| hide' not in source:
            parts += [''.join(o['data']['text/markdown'])
                      for o in cell['outputs'] if 'text/markdown' in o.get('data', {})]
    text = '\n\n'.join(p.strip() for p in parts if p.strip()) + '\n'
    # links of nbs/index.ipynb, seen from the root
    return re.sub(r'\]\((?!https?:|\.\./|#)', '](nbs/', text).replace('](../', '](')

if __name__ == '__main__':
    if '--write' in sys.argv:
        (root/'README.md').write_text(readme())
        sys.exit()
    bad = 0
    for what,patterns,command in (('out of date with its notebook: run nbdev_export and commit',
                                   ['opentrans/**/*.py'], ['nbdev_export']),
                                  ('not clean: run nbdev_clean and commit', ['nbs/**/*.ipynb'], ['nbdev_clean'])):
        for name in changed(patterns, command):
            print(f'{name} is {what}')
            bad += 1
    if readme() != (root/'README.md').read_text():
        print('README.md is not what nbs/index.ipynb says: run python tests/check_notebooks.py --write and commit')
        bad += 1
    print('notebooks are exported and clean' if not bad else f'{bad} files differ')
    sys.exit(bool(bad))
