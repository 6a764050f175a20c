"""What opentrans needs besides torch, torchvision, timm and transformers, as wheels in a folder, for a machine that
fetches nothing.

    python benchmarks/gpu_bundle.py [FOLDER]     (`make gpu-bundle`: gpu-bundle/)

The wheels are those of Python 3.12 on Linux, in the versions that are installed here, without their own tests,
so that all are below 64 MB.
`gpu_check.py` takes from them what a machine lacks.
"""
import importlib.metadata, subprocess, sys, zipfile
from pathlib import Path

WHEELS = ('open_clip_torch', 'ftfy', 'wcwidth', 'fastcore', 'pandas', 'python-dateutil', 'six', 'scipy',
          'matplotlib', 'contourpy', 'cycler', 'kiwisolver', 'pyparsing', 'fonttools', 'pydantic', 'pydantic_core',
          'annotated-types', 'typing-inspection', 'threadpoolctl')
PLATFORMS = ('manylinux_2_28_x86_64', 'manylinux_2_27_x86_64', 'manylinux_2_17_x86_64', 'manylinux2014_x86_64')
MOST = 64_000_000 # bytes of all wheels

def version_here(name):
    "A name with the version of this environment, which the tests have run with."
    try: return f'{name}=={importlib.metadata.version(name)}'
    except importlib.metadata.PackageNotFoundError: return name

def download(folder):
    "Fetch the wheels from the package index."
    platforms = [part for name in PLATFORMS for part in ('--platform', name)]
    command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--only-binary=:all:',
               '--python-version', '3.12', *platforms]
    subprocess.run([*command, '--dest', str(folder), *map(version_here, WHEELS)], check=True)

def slim(wheel):
    "Leave the tests of a wheel out, and press the rest as small as it gets."
    small = wheel.with_suffix('.part')
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(small, 'w', zipfile.ZIP_LZMA) as new:
        for entry in old.infolist():
            if '/tests/' not in entry.filename: new.writestr(entry.filename, old.read(entry))
    small.replace(wheel)

def main(folder='gpu-bundle'):
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    for old in folder.glob('*.whl'): old.unlink()
    download(folder)
    wheels = sorted(folder.glob('*.whl'))
    for wheel in wheels: slim(wheel)
    size = sum(wheel.stat().st_size for wheel in wheels)
    print(f'{len(wheels)} wheels of {size/1e6:.1f} MB in {folder}/')
    return 0 if size < MOST else f'That is more than {MOST/1e6:.0f} MB.'

if __name__ == '__main__': sys.exit(main(*sys.argv[1:]))
