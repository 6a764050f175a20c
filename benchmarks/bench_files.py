"""Megabytes of CLIP's RN50 image tower on disk, dense and as `SparseMask.bake` writes it.

    python benchmarks/bench_files.py [--density 0.1] [--out benchmarks/bench_files.json]

The weights are random: the size of a baked file depends on how many weights a mask keeps, and neither on which nor
on their values. Both files are written and weighed.
"""
import argparse, platform, tempfile
from pathlib import Path
import torch
from bench_sparse import tower
from opentrans.files import save_json, save_tensors
from opentrans.pruning import load_baked, SparseMask

def weigh(density):
    "Bytes of both files, and whether the small one gives back what the mask leaves."
    net = tower()
    mask = SparseMask.magnitude(net, density)
    with tempfile.TemporaryDirectory() as folder:
        dense, baked = Path(folder)/'dense.safetensors', Path(folder)/'baked.safetensors'
        save_tensors(net.state_dict(), dense)
        mask.bake(net, baked)
        again = load_baked(baked)
        same = all(torch.equal(value, again[name]) for name, value in net.state_dict().items())
        return dict(density=density, weights=sum(p.numel() for p in net.parameters()), same=same,
                    dense_mb=dense.stat().st_size/1e6, baked_mb=baked.stat().st_size/1e6)

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--density', type=float, default=.1)
    parser.add_argument('--out', default='benchmarks/bench_files.json')
    told = parser.parse_args()
    row = dict(machine=platform.machine(), torch=torch.__version__, model='RN50 image tower without its pool',
               **weigh(told.density))
    save_json(row, told.out)
    print(row)
