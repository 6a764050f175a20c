"""Seconds and memory of pruning a whole tower layer by layer: RN50 at full size, with random weights.

    python benchmarks/bench_reconstruction.py [--methods wanda sparsegpt alps] [--tower RN50] [--images 128]
    [--size 224] [--folder PHOTOGRAPHS] [--threads 2]

Each method runs in a process of its own, which tells its peak memory. The images are photographs of a folder,
cut to squares and repeated in other
windows as often as needed; without a folder they are smooth noise. Weights are random: the sizes are real, what
is pruned is not.
CPU seconds are those of all threads; on a busy machine wall time is longer than it would be alone. Results:
bench_reconstruction.json, for each
method the whole run, the share of Gram matrices and solvers by kind of layer, and the error of the layers' outputs.
"""
import argparse, json, os, resource, subprocess, sys, time
from pathlib import Path

def photographs(folder, images, size):
    "Square windows of the photographs of a folder, each photograph again in other windows until there are enough."
    import torch
    from PIL import Image
    from torchvision.transforms import functional as T
    files = sorted(p for p in Path(folder).rglob('*') if p.suffix in ('.jpg', '.jpeg', '.png'))
    draws,res = torch.Generator().manual_seed(0),[]
    for i in range(images):
        picture = T.to_tensor(Image.open(files[i % len(files)]).convert('RGB'))
        short = min(picture.shape[-2:])
        side = int(short*(.5+.5*torch.rand((), generator=draws)))
        y,x = (int(torch.randint(n-side+1, (), generator=draws)) for n in picture.shape[-2:])
        res.append(T.resize(picture[:, y:y+side, x:x+side], [size, size], antialias=True))
    return torch.stack(res)

def noise(images, size):
    import torch
    torch.manual_seed(0)
    return torch.nn.functional.interpolate(torch.rand(images, 3, size//16, size//16), size, mode='bilinear')

def run(args):
    "One method, in this process."
    import torch
    from opentrans.clip import ClipBackbone
    from opentrans.pruning import reconstruct
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clip = ClipBackbone.create(args.tower, pretrained=None)
    pictures = photographs(args.folder, args.images, args.size) if args.folder else noise(args.images, args.size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20
    wall,cpu = time.perf_counter(),time.process_time()
    mask,table = reconstruct(clip, [*pictures.split(args.batch)], args.density, args.run, cache_mb=args.cache_mb)
    wall,cpu = time.perf_counter()-wall,time.process_time()-cpu
    slowest = table.sort_values('seconds').tail(3)
    return dict(method=args.run, layers=len(table), density=mask.density, wall_seconds=round(wall, 1),
                cpu_seconds=round(cpu, 1),
                peak_gb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20, 2),
                gb_before=round(before, 2), error_median=float(table.error.median()),
                error_most=float(table.error.max()),
                slowest={n: round(float(s), 1) for n,s in slowest.seconds.items()},
                load=[round(x, 1) for x in os.getloadavg()])

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--methods', nargs='+', default=['wanda', 'sparsegpt', 'alps'])
    parser.add_argument('--run', help='one method, here; prints its result as JSON')
    parser.add_argument('--tower', default='RN50')
    parser.add_argument('--folder', default='')
    for name,value in dict(images=128, size=224, batch=8, threads=2, cache_mb=1024).items():
        parser.add_argument(f'--{name.replace("_", "-")}', type=int, default=value)
    parser.add_argument('--density', type=float, default=.1)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(run(args)))
        sys.exit()
    out = Path(__file__).with_suffix('.json')
    rows = {}
    for method in args.methods:
        more = [f'--{k.replace("_", "-")}={getattr(args, k)}'
                for k in ('tower', 'folder', 'images', 'size', 'batch', 'threads', 'cache_mb', 'density')]
        done = subprocess.run([sys.executable, __file__, '--run', method, *more], capture_output=True, text=True,
                              check=True)
        rows[method] = json.loads(done.stdout.splitlines()[-1])
        print(rows[method], flush=True)
        from opentrans.experiments import hardware
        told = dict(what=f'{args.tower} with random weights, {args.images} images of {args.size} pixels, density '
                    f'{args.density:g}, {args.threads} threads', photographs=bool(args.folder),
                    command='python ' 'benchmarks/bench_reconstruction.py', run=hardware(), methods=rows)
        out.write_text(json.dumps(told, indent=1)+'\n')
