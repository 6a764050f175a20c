"The notebooks are the source: fail if exporting or cleaning them would change a committed file."
import shutil, subprocess, sys, tempfile
from pathlib import Path

root = Path(__file__).resolve().parent.parent
tools = Path(sys.executable).parent

def files(folder, *patterns): return {str(p.relative_to(folder)): p.read_bytes() for g in patterns for p in sorted(folder.glob(g)) if '.ipynb_checkpoints' not in p.parts}

def changed(patterns, command):
    "Names of the files that `command` changes, run in a copy of the repository."
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp)/root.name
        copy.mkdir()
        shutil.copy(root/'settings.ini', copy)
        for part in ('nbs', 'opentrans'): shutil.copytree(root/part, copy/part, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
        subprocess.run([str(tools/command[0]), *command[1:]], cwd=copy, check=True)
        old,new = files(root, *patterns),files(copy, *patterns)
        return sorted(n for n in {*old, *new} if old.get(n) != new.get(n))

if __name__ == '__main__':
    bad = 0
    for what,patterns,command in (('out of date with its notebook: run nbdev_export and commit', ['opentrans/**/*.py'], ['nbdev_export']),
                                  ('not clean: run nbdev_clean and commit', ['nbs/**/*.ipynb'], ['nbdev_clean'])):
        for name in changed(patterns, command): print(f'{name} is {what}'); bad += 1
    print('notebooks are exported and clean' if not bad else f'{bad} files differ')
    sys.exit(bool(bad))
