"""The paper's run from end to end, by its commands, at its own sizes, with few iterations: does each step go through?

    python tests/fake_datasets.py ROOT
    python benchmarks/bench_end_to_end.py ROOT OUT                     two hours of two cores
                                                   --only prune,transfer-fpn
                                                   --result result.json

The commands are those of the page "The paper's run", where the result is shown. What is shorter stands behind them:
iterations, images of a batch, images of an evaluation. CLIP's RN50 has random weights and scenes are generated, so
that no score means anything. Each step's wall time, CPU seconds of all its processes and largest process are stored;
a step that is stored and whose files are there is not run again.
"""
import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
import torch
from opentrans.files import load_json, save_json

FRAMEWORKS = ('fpn', 'deeplabv3', 'mask2former', 'faseg', 'fcclip')
CLIP = '--backbone RN50 --pretrained none --data coco_panoptic --root ROOT'
SHORT = '--iterations 2 --batch-size {images} --accumulate {images} --limit 1 --workers 0' # an image at a time

def transfer(name):
    "Fine-tuning under the mask, and an evaluation."
    short = SHORT.format(images=2 if name == 'fcclip' else 4)
    return f'opentrans transfer mask.safetensors --framework {name} {CLIP} --out run-{name} {short}'

def steps():
    "Each step's command, and the file that it leaves."
    found = {'prune': ('accelerate launch --multi_gpu --num_processes 2 -m opentrans.cli prune '
                       f'{CLIP} --out mask.safetensors --iterations 1 --workers 0', 'mask.safetensors')}
    for name in FRAMEWORKS:
        found[f'transfer-{name}'] = (transfer(name), f'run-{name}/result.json')
        found[f'evaluate-{name}'] = (f'opentrans evaluate --model run-{name} --data all --root ROOT '
                                     f'--out table1-{name} --limit 1 --batch-size 1', f'table1-{name}')
        found[f'segment-{name}'] = (f'opentrans segment PHOTO "sky, road, sofa | couch" --model run-{name} '
                                    f'--out {name}.png', f'{name}.png')
    few = 'batch_size=2 accumulate=2 imp_batch=2 val=1 domain=1'.split() # images
    found['study-frameworks'] = (
        'opentrans study frameworks --scale coco --root ROOT --pretrained none --seeds 1 --out study '
        '--arm dense --arm "distilled mask" --device cpu --iterations 4 '
        + ' '.join(f'--set {told}' for told in few), 'study')
    return found

def arguments(command, root):
    "A command as this machine runs it."
    photo = str(next((root/'coco'/'val2017').glob('*.jpg')))
    told = {'ROOT': str(root), 'PHOTO': photo}
    words = [told.get(word, word) for word in shlex.split(command)]
    if words[0] == 'opentrans': return [sys.executable, '-m', 'opentrans.cli', *words[1:]]
    return [str(Path(sys.executable).with_name('accelerate')), *words[1:]]

def run(name, command, root, out):
    "Run a step; its wall time, CPU seconds, and gigabytes of its largest process."
    began = time.monotonic()
    setting = dict(os.environ, OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true')
    with open(out/f'{name}.log', 'w') as log:
        process = subprocess.Popen(arguments(command, root), cwd=out, env=setting, stdout=log, stderr=log)
        _,status,used = os.wait4(process.pid, 0) # with what it has waited for
    wall = time.monotonic()-began
    if status: sys.exit(f"'{name}' ended with {os.waitstatus_to_exitcode(status)}: see {out/name}.log")
    return dict(command=command, wall=round(wall), cpu=round(used.ru_utime + used.ru_stime),
                gigabytes=round(used.ru_maxrss/1e6, 1))

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('root', type=Path, help='what tests/fake_datasets.py has written')
    parser.add_argument('out', type=Path, help='folder for what the commands write')
    parser.add_argument('--only', help='names of steps with commas; default: all')
    parser.add_argument('--result', default=Path(__file__).with_suffix('.json'), type=Path)
    told,known = parser.parse_args(),steps()
    out,root = told.out.resolve(),told.root.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name in told.only.split(',') if told.only else known:
        if name not in known: parser.error(f"unknown step {name}: one of {', '.join(known)}")
        command,leaves = known[name]
        kept = load_json(told.result) if told.result.exists() else dict(steps={})
        if kept['steps'].get(name, {}).get('command') == command and (out/leaves).exists(): continue
        row = run(name, command, root, out)
        kept.update(machine=platform.machine(), cores=os.cpu_count(), torch=torch.__version__,
                    steps={**kept['steps'], name: row})
        save_json(kept, told.result)
        print(json.dumps({name: row}), flush=True)

if __name__ == '__main__': main()
