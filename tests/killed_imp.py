"""What `test_pruning` runs: python killed_imp.py OUT prunes in children that are killed at random moments, once in the
middle of writing, until one ends; what it ends with must be what a run without a kill ends with."""
import os, random, signal, sys, time
import torch
from torch import nn
from children import exit_code, fork
from opentrans.pruning import imp

torch.set_num_threads(1)
OPTIONS = dict(density=.25, p=.2, seed=3)

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8),
                         nn.Flatten(), nn.Linear(128, 3))

def train(model, round, iters=2):
    "A round of training on noise."
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(iters):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()

def twice(model, round):
    for _ in range(2): train(model, round, 1)

def prune(folder, rewind, pipe, allowed, dies_at_write):
    "The child: tells each third of a round; after so many that are allowed, and one more, waits to be killed."
    if dies_at_write: os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    thirds = []
    def tell():
        thirds.append(os.write(pipe, b'.'))
        if len(thirds) > allowed: signal.pause()
    def told(model, round):
        tell()
        for _ in range(2):
            train(model, round, 1)
            tell()
    imp(net(), told, rewind=rewind, checkpoint_dir=folder, **OPTIONS)

def attempt(folder, rewind, dies_at_write):
    "The exit code of a child, which is killed after a random number of thirds or kills itself when it writes."
    seen = random.randint(1, 7)
    heard, pipe = os.pipe()
    pid = fork(prune, folder, rewind, pipe, 100 if dies_at_write else seen, dies_at_write)
    os.close(pipe)
    for _ in range(seen): os.read(heard, 1)
    if not dies_at_write:
        time.sleep(random.uniform(0, .02))
        os.kill(pid, signal.SIGKILL)
    code = exit_code(pid)
    os.close(heard)
    return code

def check(folder, rewind):
    whole = net()
    mask, history = imp(whole, twice, rewind=rewind, **OPTIONS)
    codes = []
    while len(codes) < 40 and 0 not in codes: codes.append(attempt(folder, rewind, dies_at_write=len(codes) == 2))
    assert codes[-1] == 0 and codes.count(-9) >= 3 and 9 not in codes, codes
    again, trained = net(), []
    found, rows = imp(again, lambda model, round: trained.append(round), rewind=rewind, checkpoint_dir=folder,
                      **OPTIONS)
    assert not trained and found == mask
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in whole.state_dict().items())
    assert history.drop(columns='seconds').equals(rows.drop(columns='seconds'))
    print('killed', codes.count(-9))

def main(out):
    random.seed(0)
    for rewind in (None, 'start'): check(f'{out}/{rewind}', rewind)

if __name__ == '__main__': main(sys.argv[1])
