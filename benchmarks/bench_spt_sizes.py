"""SPT and stitching at real size, with random weights: what is counted, whether files and merges are exact, what it
costs.

    python benchmarks/bench_spt_sizes.py [--out benchmarks/bench_spt_sizes.json]

Each network runs in a process of its own, so that its peak of memory is its own. CPU seconds are those of the
process."""
import argparse, json, platform, resource, subprocess, sys, tempfile, time
from pathlib import Path

NETWORKS = ('vit_base_patch16_224', 'swin_base_patch4_window7_224', 'convnext_base', 'resnet50')
FAMILIES = {'DeiT-Ti/S/B': ('deit_tiny_patch16_224', 'deit_small_patch16_224', 'deit_base_patch16_224'),
            'ResNet-18/34': ('resnet18', 'resnet34')}

def peak(): return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20, 2) # GiB

def tuned(name, samples=4, batch=2):
    import timm, torch
    import torch.nn.functional as F
    from opentrans.vit.peft_files import load_added, save_added
    from opentrans.vit.sensitivity import param_sensitivity
    from opentrans.vit.spt import allocate, apply_spt, merge_spt
    torch.manual_seed(0)
    def new():
        torch.manual_seed(0)
        return timm.create_model(name, pretrained=False, num_classes=100)
    x, y = torch.randn(samples, 3, 224, 224), torch.randint(100, (samples,))
    loader = [(x[i:i+batch], y[i:i+batch]) for i in range(0, samples, batch)]
    model, at = new(), [time.process_time()]
    def tick(): at.append(time.process_time())
    sens = param_sensitivity(model, loader)
    tick()
    alloc = allocate(sens, 400_000)
    tick()
    apply_spt(model, alloc, seed=0)
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    for a,b in loader:
        opt.zero_grad()
        F.cross_entropy(model(a), b).backward()
        opt.step()
    tick()
    model.eval()
    with tempfile.TemporaryDirectory() as tmp, torch.no_grad():
        want = model(x[:2])
        save_added(model, Path(tmp)/'spt.safetensors')
        size = (Path(tmp)/'spt.safetensors').stat().st_size
        other = new().eval()
        load_added(other, Path(tmp)/'spt.safetensors')
        loaded = float((other(x[:2])-want).abs().max())
        merged = float((merge_spt(other)(x[:2])-want).abs().max())
    seconds = [round(b-a, 1) for a,b in zip(at, at[1:])]
    return dict(name=name, params=sum(p.numel() for p in new().parameters()), budget=400_000, spent=alloc.spent,
                head=alloc.head, tau=alloc.tau, structured=len(alloc.structured),
                single=sum(int(m.sum()) for m in alloc.masks.values()),
                trained=sum(p.numel() for p in model.parameters() if p.requires_grad), counted=alloc.n_trainable,
                loaded_difference=loaded, merged_difference=merged, largest_output=float(want.abs().max()),
                file_mb=round(size/2**20, 2), samples=samples, seconds_sensitivity=seconds[0],
                seconds_allocation=seconds[1], seconds_per_step=round(seconds[2]/len(loader), 1), peak_gib=peak())

def stitched(name, side=64): # the real networks; small pictures, so that every stitch can have its turn on a CPU
    import timm, torch
    from opentrans.pruning.baked import export_onnx
    from opentrans.vit.stitch_training import deploy, StitchSampler, StitchTrainer
    from opentrans.vit.stitching import apply_pst, pst_report, stitch_table, StitchableNet
    torch.manual_seed(0)
    options = dict(img_size=side) if name.startswith('DeiT') else {}
    models = [timm.create_model(n, pretrained=False, num_classes=100, **options) for n in FAMILIES[name]]
    began = time.process_time()
    net = StitchableNet(models)
    x = torch.randn(2, 3, side, side)
    net.eval()
    net.init_stitches(torch.randn(2, 3, side, side))
    apply_pst(net, (32, 16, 8)[:len(models)])
    table = stitch_table(net, (3, side, side))
    sampler = StitchSampler(table.flops, 3)
    run = StitchTrainer(net.train(), sampler,
                        torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4))
    small = torch.randn(1, 3, side, side), torch.randint(100, (1,))
    steps = len(net.configs) # each has its turn once
    history = run.fit([small]*steps)
    net.eval()
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        for s,network in deploy(net, sampler, [(x,)] if name.startswith('ResNet') else None).items():
            with torch.no_grad():
                merged = float((network(x)-net(x, s)).abs().max()) if not name.startswith('ResNet') else None
            rows.append(dict(stitch=s, name=table.name[s], flops=int(table.flops[s]), params=int(table.params[s]),
                             counted=sum(p.numel() for p in network.parameters()), merged_difference=merged,
                             onnx_difference=export_onnx(network, Path(tmp)/f'{s}.onnx', x)))
    counts = sampler.tracker.counts
    return dict(name=name, side=side, stitches=len(net.configs), steps=steps, drawn=int((counts > 0).sum()),
                fewest=int(counts.min()), trained=int(pst_report(net).total), deployed=rows,
                diverged=bool(history.loss.isna().any()), seconds=round(time.process_time()-began, 1),
                peak_gib=peak())

if __name__ == '__main__':
    options = argparse.ArgumentParser()
    options.add_argument('--out', default='benchmarks/bench_spt_sizes.json')
    options.add_argument('--one')
    told = options.parse_args()
    if told.one:
        import torch
        torch.set_num_threads(1)
        print(json.dumps(stitched(told.one) if told.one in FAMILIES else tuned(told.one)))
        sys.exit()
    kept = Path(told.out)
    done = (json.loads(kept.read_text()) if kept.exists()
            else dict(what='SPT and PST at real size, random weights, random pictures: counts, exactness, cost',
                      networks=[], families=[]))
    for name in (*NETWORKS, *FAMILIES):
        group = done['families' if name in FAMILIES else 'networks']
        if any(row['name'] == name for row in group): continue
        out = subprocess.run([sys.executable, __file__, '--one', name], capture_output=True, text=True)
        if out.returncode: sys.exit(out.stderr[-3000:])
        group.append(json.loads(out.stdout.splitlines()[-1]))
        import timm, torch
        done['run'] = dict(command='python benchmarks/bench_spt_sizes.py', torch=torch.__version__,
                           timm=timm.__version__, python=platform.python_version(), threads=1)
        kept.write_text(json.dumps(done, indent=1))
        print(name, group[-1], flush=True)
