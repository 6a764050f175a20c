"""What `test_finetune` runs: python killed_finetune.py OUT KILLS SEED trains three times: left alone in OUT/whole,
killed at random moments and resumed in OUT/killed, and in OUT/full on a disk that takes no file above 1 MB. It prints
how many children were killed while they ran, and the exit code of the one whose disk is full."""
import os, random, resource, signal, sys, time
from pathlib import Path
import torch
from children import exit_code
from opentrans.core import LayerSelection
from opentrans.data import ShapesWorld
from opentrans.frameworks import build
from opentrans.frameworks.contract import tiny_backbone
from opentrans.pruning import SparseMask
from opentrans.training import Recipe, finetune

torch.set_num_threads(1)

def train(folder, tell):
    "A short run with a mask, a selection and all that draws random numbers; tells each iteration."
    world, clip = ShapesWorld(n=8, size=32), tiny_backbone()
    mask = SparseMask.magnitude(clip.tower, .2)
    seg = build('deeplabv3', clip, vocabulary=world.vocabulary, preset='small', width=16, dropout=.3, seed=0)
    recipe = Recipe.tiny().replace(iterations=48, batch_size=3, crop=32, scale=(.7, 1.4))
    half = LayerSelection(mask.names[::2], mask.names[1::2], 'every second')
    finetune(seg, world, recipe, selection=half, mask=mask, checkpoint_dir=folder, checkpoint_every=3,
             callback=lambda framework, row: tell())

def no_file_above(size):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

def child(folder, allowed=10**6, largest=None):
    """Trains in a process of its own, which tells every iteration, and after so many that are allowed waits to be
    killed. Its id, and where it tells."""
    heard, pipe = os.pipe()
    if pid := os.fork():
        os.close(pipe)
        return pid, heard
    os.close(heard)
    told = []
    def tell():
        told.append(os.write(pipe, b'.'))
        if len(told) > allowed: signal.pause()
    if largest: no_file_above(largest)
    try:
        train(folder, tell)
        os._exit(0)
    except BaseException as error:
        os.write(2, f'{type(error).__name__}: {error}'.encode())
        os._exit(2)

def ends(folder, **options):
    "The exit code of a child that nobody kills."
    pid, _ = child(folder, **options)
    return exit_code(pid)

def killed(folder, numbers):
    "Whether a child dies by kill -9 somewhere in the iteration after some, which is the last that it can finish."
    seen = numbers.randint(1, 5)
    pid, heard = child(folder, allowed=seen)
    for _ in range(seen): os.read(heard, 1)
    time.sleep(numbers.uniform(0, .03))
    os.kill(pid, signal.SIGKILL)
    code = exit_code(pid)
    os.close(heard)
    return code == -signal.SIGKILL

def main(out, kills, seed):
    tiny_backbone()     # reads the tokenizer's table once for all children
    numbers = random.Random(seed)
    assert ends(out/'whole') == 0
    died = sum(killed(out/'killed', numbers) for _ in range(kills))
    assert ends(out/'killed') == 0
    (out/'full').mkdir()
    (out/'full'/'notes.txt').touch()
    print(died, ends(out/'full', largest=1_000_000))

if __name__ == '__main__': main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
