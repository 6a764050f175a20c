"""Per-sample sensitivity of opentrans beside a plain loop over samples and torch.func: time, memory, and the same
values.

    OMP_NUM_THREADS=1 python benchmarks/bench_sensitivity.py [--images 400] [--func-images 16] [--model
    vit_base_patch16_224] [--size 224] [--chunk 8] [--out bench.json]

timm's ViT-B/16 with random weights, random images, 100 classes; the sums are over its 194 candidate tensors.
Each tool runs in a process of its own, one after the other, so that the peak of its resident memory (from the
system) is its own;
time is processor time of the tool's call. torch.func holds the gradients of `--func-chunk` images at once and
runs on `--func-images` only: its time an image does not depend on their number.
Values are compared with the loop's on all its images, relative to the largest of each tensor. opentrans runs on
a quarter of the images as well: its memory is the same.
"""
import argparse, json, os, platform, resource, subprocess, sys, tempfile, time
from pathlib import Path
import torch
import torch.nn.functional as F

def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--images', type=int, default=400)
    p.add_argument('--func-images', type=int, default=16)
    p.add_argument('--func-chunk', type=int, default=4)
    p.add_argument('--model', default='vit_base_patch16_224')
    p.add_argument('--size', type=int, default=224)
    p.add_argument('--chunk', type=int, default=8)
    p.add_argument('--out')
    p.add_argument('--tool', help=argparse.SUPPRESS)
    p.add_argument('--n', type=int, help=argparse.SUPPRESS)
    p.add_argument('--save', help=argparse.SUPPRESS)
    return p

class Images:
    "Random images by number, made when they are asked for, in batches."
    def __init__(self, n, size, batch): self.n,self.size,self.batch = n,size,batch
    def __iter__(self):
        for a in range(0, self.n, self.batch):
            at = range(a, min(a+self.batch, self.n))
            yield torch.stack([torch.randn(3, self.size, self.size, generator=torch.Generator().manual_seed(i))
                               for i in at]),torch.tensor([i % 100 for i in at])

def opentrans(model, args, names):
    from opentrans.vit.sensitivity import param_sensitivity
    return dict(param_sensitivity(model, Images(args.n, args.size, args.chunk), F.cross_entropy, n_samples=args.n,
                                  chunk=args.chunk))

def loop(model, args, names):
    "What one would write: a backward pass for each sample, gradients only where they are wanted."
    from opentrans.vit.peft import slots
    there = slots(model)
    params = list({id(there[n].param): there[n].param for n in names}.values())
    model.requires_grad_(False)
    for p in params: p.requires_grad_(True)
    sums = {id(p): torch.zeros_like(p) for p in params}
    for x,y in Images(args.n, args.size, 1):
        for p,g in zip(params, torch.autograd.grad(F.cross_entropy(model(x), y), params)):
            sums[id(p)].addcmul_(g, g)
    return {n: sums[id(there[n].param)] if there[n].rows is None
            else sums[id(there[n].param)][slice(*there[n].rows)] for n in names}

def func(model, args, names):
    "torch.func: vmap of grad over samples."
    from opentrans.vit.peft import slots
    from torch.func import functional_call, grad, vmap
    there = slots(model)
    key = {n: n.split('[')[0] for n in names}
    own = {k: p.detach() for k,p in model.named_parameters() if k in set(key.values())}
    one = vmap(grad(lambda p, x, y: F.cross_entropy(functional_call(model, p, (x[None],)), y[None])), (None, 0, 0))
    sums = {k: torch.zeros_like(p) for k,p in own.items()}
    model.requires_grad_(False)
    for x,y in Images(args.n, args.size, args.func_chunk):
        for k,g in one(own, x, y).items(): sums[k] += g.square().sum(0)
    return {n: sums[key[n]] if there[n].rows is None else sums[key[n]][slice(*there[n].rows)] for n in names}

def one(args):
    import timm
    from opentrans.files import save_tensors
    from opentrans.vit.sensitivity import candidates
    torch.manual_seed(0)
    model = timm.create_model(args.model, num_classes=100, img_size=args.size).eval()
    names = list(candidates(model))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began,wall = time.process_time(),time.time()
    res = dict(opentrans=opentrans, loop=loop, func=func)[args.tool](model, args, names)
    row = dict(tool=args.tool, images=args.n, seconds=time.process_time()-began, wall=time.time()-wall,
               peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024, model_mib=before/1024,
               tensors=len(res), entries=sum(t.numel() for t in res.values()))
    if args.save: save_tensors({n: t.clone() for n,t in res.items()}, args.save)
    print(json.dumps(row))

def run(args, tool, n, save=None):
    cmd = ([sys.executable, __file__, '--tool', tool, '--n', str(n), '--model', args.model, '--size',
            str(args.size), '--chunk', str(args.chunk), '--func-chunk', str(args.func_chunk)]
           + (['--save', str(save)] if save else []))
    row = json.loads(subprocess.run(cmd, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    print(
        f"{tool:10} {n:4} images: {row['seconds']:8.1f} s, {row['seconds']/n:.3f} s an image, peak memory "
        f"{row['peak_mib']:.0f} MiB (with the model alone {row['model_mib']:.0f})", flush=True)
    return row

def main(args):
    print(
        f"{args.model} at {args.size}, torch {torch.__version__}, "
        f"{os.environ.get('OMP_NUM_THREADS', torch.get_num_threads())} thread(s), {platform.machine()}, Python "
        f"{platform.python_version()}", flush=True)
    from opentrans.files import load_tensors, save_json
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        few = min(args.func_images, args.images)
        rows = [run(args, 'opentrans', max(1, args.images//4)), run(args, 'opentrans', args.images, tmp/'ours'),
                run(args, 'loop', args.images, tmp/'loop'), run(args, 'func', few, tmp/'func'),
                run(args, 'opentrans', few, tmp/'few')]
        def error(a, b):
            a,b = load_tensors(tmp/a)[0],load_tensors(tmp/b)[0]
            top = max(float(t.max()) for t in b.values())
            return max(float((a[n]-b[n]).abs().max())/max(float(b[n].max()), 1e-6*top) for n in b)
        errors = dict(loop=error('ours', 'loop'), func=error('few', 'func'))
    each = {r['tool']: r['seconds']/r['images'] for r in rows[1:4]}
    faster = {t: each[t]/each['opentrans'] for t in ('loop', 'func')}
    print(
        f"{rows[1]['tensors']} tensors, {rows[1]['entries']:,} entries. Largest difference relative to a tensor's "
        f"largest value: to the loop {errors['loop']:.1e}, to torch.func {errors['func']:.1e}")
    print(
        f"Faster than the loop x {faster['loop']:.2f}, than torch.func x {faster['func']:.2f}; memory of "
        f"{rows[1]['images']} images / of {rows[0]['images']}: {rows[1]['peak_mib']/rows[0]['peak_mib']:.3f}")
    if args.out:
        from datetime import date
        from opentrans.experiments import hardware
        facts = dict(command='python benchmarks/bench_sensitivity.py', date=str(date.today()),
                     threads=torch.get_num_threads(), **hardware())
        settings = {k: v for k,v in vars(args).items() if k not in ('out', 'tool', 'n', 'save')}
        save_json(dict(run=facts, settings=settings, rows=rows, errors=errors, faster=faster), args.out)

if __name__ == '__main__':
    args = parser().parse_args()
    one(args) if args.tool else main(args)
