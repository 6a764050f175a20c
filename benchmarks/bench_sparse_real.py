"""The engine under a mask that Algorithm 1 has found: `photo-lite0` after a short distillation on MSRC's photographs.

    opentrans prune --out mask.safetensors --backbone photo-lite0 --data msrc --root ROOT --density .1 --p .32
    --iterations 15 --batch-size 4
    python benchmarks/bench_sparse_real.py mask.safetensors [--out benchmarks/bench_sparse_real.json] [--deepsparse
    PYTHON] [--seconds 20]

lite0   the tower of `photo-lite0` (EfficientNet-lite0) with that mask, beside onnxruntime dense, in turns
rn50    CLIP's RN50 trunk with the mask's densities: each layer has the density of the layer of lite0 at the same
        relative depth (of those that are not depthwise), all scaled to a tenth of the weights, at random places
--deepsparse: a Python that has deepsparse==1.7.1; its times of the same ONNX files, in a process of its own, one
thread, wall time (shortest call), are stored beside ours (wall time, too, right after it). On a busy machine they
say little: `load` is stored.
"""
import argparse, json, os, subprocess, tempfile, time, warnings
from pathlib import Path
os.environ.setdefault('OMP_NUM_THREADS', '1')
import numpy as np
import torch
from bench_sparse import processor, tower
from opentrans import sparse
from opentrans.clip import ClipBackbone
from opentrans.files import save_json
from opentrans.pruning import fit_densities, SparseMask
from opentrans.sparse.speed import _export, _Timed

warnings.simplefilter('ignore')
OTHER = '''
import json, sys, time
import numpy as np
from deepsparse import Engine
engine = Engine(sys.argv[1], batch_size=1, num_cores=1)
x = [np.random.rand(1, 3, int(sys.argv[2]), int(sys.argv[2])).astype(np.float32)]
times = []
for _ in range(int(sys.argv[3])):
    start = time.perf_counter()
    engine.run(x)
    times.append(time.perf_counter() - start)
print(json.dumps(min(times)*1e3))
'''

def rn50_like(mask):
    "RN50's trunk with the densities of a mask, by relative depth."
    net = tower()
    ones = SparseMask.ones(net)
    told = [float(bits.float().mean()) for bits in mask.masks.values() if bits.ndim == 4 and bits.shape[1] > 1]
    depth = np.linspace(0, 1, len(ones.names))
    shares = np.interp(depth, np.linspace(0, 1, len(told)), told)
    sizes = {name: int(np.prod(shape)) for name, shape in ones.shapes.items()}
    densities = fit_densities(dict(zip(ones.names, map(float, shares))), sizes, .1)
    SparseMask.random(net, densities).apply(net).remove()
    return net

def of_deepsparse(python, path, size, runs=20):
    "Milliseconds of deepsparse, or why there are none."
    environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    command = [python, '-c', OTHER, path, str(size), str(runs)]
    made = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = made.stdout.strip().splitlines()
    return float(lines[-1]) if not made.returncode else made.stderr[-300:]

@torch.no_grad()
def beside_deepsparse(python, model, size):
    "Its shortest call and ours, one after the other."
    with tempfile.TemporaryDirectory() as folder:
        theirs = of_deepsparse(python, _export(_Timed(model).eval(), (size, size), folder), size)
    fast, x, times = _Timed(sparse.compile(model)), torch.rand(1, 3, size, size), []
    for _ in range(21):
        start = time.perf_counter()
        fast(x)
        times.append(time.perf_counter() - start)
    return dict(deepsparse_ms=theirs, ours_wall_ms=min(times[1:])*1e3)

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('mask')
    parser.add_argument('--out', default='benchmarks/bench_sparse_real.json')
    parser.add_argument('--deepsparse', default=None)
    parser.add_argument('--sizes', type=int, nargs='+', default=[224, 512])
    parser.add_argument('--seconds', type=float, default=20)
    a = parser.parse_args()
    torch.set_num_threads(1)
    mask = SparseMask.load(a.mask)
    clip = ClipBackbone.create('photo-lite0', pretrained='photo-lite0').eval()
    mask.apply(clip).remove()
    about = {name: value for name, value in mask.info.items() if isinstance(value, (int, float, str))}
    result = dict(processor=processor(), mask=about, density=mask.density, rows=[])
    if Path(a.out).exists(): result['rows'] = json.loads(Path(a.out).read_text())['rows']
    for name, model in dict(lite0=clip, rn50=rn50_like(mask)).items():
        for size in a.sizes:
            if any(row['model'] == name and row['height'] == size for row in result['rows']): continue
            table = sparse.speed(model, sizes=[(size, size)], engines=['onnxruntime', 'ours'], seconds=a.seconds)
            ours, theirs = (table[table.engine == engine].iloc[0] for engine in ('ours', 'onnxruntime'))
            row = dict(model=name, **ours.to_dict(), dense_ms=theirs.ms, ratio_of_shortest=theirs.ms/ours.ms,
                       load=os.getloadavg()[0])
            if a.deepsparse: row |= beside_deepsparse(a.deepsparse, model, size)
            result['rows'].append(row)
            print(json.dumps(row, default=float), flush=True)
            save_json(result, a.out)

if __name__ == '__main__': main()
