"""Damaged and forged files, for tests of readers: seeded mutations of bytes, of JSON, and of tensor files whose
checksum is right."""
import hashlib, json, os, struct
import numpy as np
import pytest
import torch
from opentrans.errors import OpenTransError
from opentrans.files import digest_of, load_tensors, save_tensors

COUNT = 2000 if os.environ.get('OPENTRANS_SLOW') == '1' else 200 # mutations of each kind of file

# what a JSON text may hold that the json module does not write
_TEXTS = {'@deep': '['*100_000 + ']'*100_000, '@long': '9'*5_000, '@nan': 'NaN', '@inf': '-Infinity',
          '@1e999': '1e999', '@half': '"\\ud800"'}
_ODD = [None, True, False, -1, 0, 1, 3, 1.5, -0.5, 1e300, 2**31, 2**63, 10**18, '', 'x', '3', '../x', 'name'*2000,
        [], {}, [[]], [None], [-1], [10**12, 10**12], {'a': 1}, {'': None}, *_TEXTS]

def mutated(
    data:bytes, # What a file holds
    rng, # A numpy generator
)->bytes:
    "Bytes with a flipped bit, a few other bytes, a part cut off, taken out, doubled or zeroed."
    out, place = bytearray(data), int(rng.integers(len(data)))
    end = place + 1 + int(rng.integers(40))
    way = rng.integers(7)
    if way == 0: out[place] ^= 1 << int(rng.integers(8))
    elif way == 1:
        for _ in range(int(rng.integers(1, 6))): out[int(rng.integers(len(out)))] = int(rng.integers(256))
    elif way == 2: del out[place:]
    elif way == 3: del out[place:end]
    elif way == 4: out[place:place] = out[place:end]
    elif way == 5: out[place:end] = bytes(len(out[place:end]))
    else: out[place:place] = rng.bytes(int(rng.integers(1, 20)))
    return bytes(out)

def _nodes(value, found):
    "Every container in a JSON value."
    if isinstance(value, (dict, list)) and len(value): found.append(value)
    if isinstance(value, dict): value = list(value.values())
    for child in value if isinstance(value, list) else (): _nodes(child, found)
    return found

def odd_json(value, rng):
    "A JSON value with one place changed: another value, one that is gone, doubled, renamed or exchanged."
    value = json.loads(json.dumps(value))
    nodes, odd = _nodes(value, []), _ODD[int(rng.integers(len(_ODD)))]
    if not nodes or rng.random() < .03: return odd
    node = nodes[int(rng.integers(len(nodes)))]
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    key, other = (keys[int(rng.integers(len(keys)))] for _ in range(2))
    way = rng.random()
    if way < .55: node[key] = odd
    elif way < .7: del node[key]
    elif way < .8: node[key], node[other] = node[other], node[key]
    elif isinstance(node, dict): node[f'{key}x'] = node.pop(key) if way < .9 else odd
    else: node.insert(key, node[other] if way < .9 else odd)
    return value

def json_of(value)->str:
    "A value of `odd_json` as text, with the things that no JSON writer writes."
    text = json.dumps(value)
    for name, odd in _TEXTS.items(): text = text.replace(json.dumps(name), odd)
    return text

def mutated_json(
    value, # What a JSON file holds
    rng, # A numpy generator
)->str:
    """A JSON text with one place changed. A checksum in `sha256` is that of the changed value, so that only the
    reader's own checks are left."""
    whole = isinstance(value, dict) and 'sha256' in value
    if not whole: return json_of(odd_json(value, rng))
    value = odd_json({k: v for k, v in value.items() if k != 'sha256'}, rng)
    if isinstance(value, dict): value['sha256'] = digest_of(value)
    return json_of(value)

def _all_wrong(tensor):
    "Numbers that no tensor of weights, masks or classes holds, of the same type."
    if tensor.is_floating_point(): return torch.full_like(tensor, float('nan'))
    wrong = -1 if tensor.is_signed() else 200
    return torch.full_like(tensor, wrong)

def _odd_tensor(tensor, rng):
    "Another tensor in place of one."
    changes = [lambda t: t.reshape(-1)[:-1], lambda t: t[None], lambda t: t.flatten(),
               lambda t: t.to(torch.float64), lambda t: t.to(torch.int8),
               _all_wrong, lambda t: torch.zeros(0),
               lambda t: torch.cat([t.flatten(), t.flatten()]), lambda t: t.to(torch.complex64),
               lambda t: torch.full_like(t, 100) if t.dtype != torch.bool else ~t,
               lambda t: torch.tensor(float('inf'))]
    return changes[int(rng.integers(len(changes)))](tensor)

def odd_tensors(tensors, meta, rng):
    "A tensor file's contents with one tensor changed, gone, renamed or new, or one entry of its metadata changed."
    tensors, meta = dict(tensors), dict(meta)
    names, way = list(tensors), rng.random()
    name, other = (names[int(rng.integers(len(names)))] for _ in range(2)) if names else ('x', 'x')
    if way < .55 or not names:
        key = list(meta)[int(rng.integers(len(meta)))]
        if way < .05: meta.pop(key)
        elif way < .1: meta[key] = ''.join(map(chr, rng.integers(32, 300, 5)))
        else:
            try: meta[key] = json_of(odd_json(json.loads(meta[key]), rng))
            except ValueError: meta[key] = 'x' + meta[key]
    elif way < .75: tensors[name] = _odd_tensor(tensors[name], rng)
    elif way < .83: tensors.pop(name)
    elif way < .91: tensors[f'{name}x' if way < .87 else other] = tensors.pop(name)
    else: tensors[f'{name}x' if way < .95 else 'model.x'] = tensors[name]
    return tensors, meta

def _odd_header(data, rng):
    """A safetensors file whose header, a JSON text, was changed in one place: sizes, types and places of the
    tensors."""
    size, = struct.unpack('<Q', data[:8])
    text = json_of(odd_json(json.loads(data[8:8+size]), rng)).encode(errors='surrogatepass')
    return struct.pack('<Q', len(text)) + text + data[8+size:]

def _write(held, path, data, rng):
    """One damaged or forged copy of a file, and of what it holds. Says whether it is forged, that is, whether another
    content may rightly be read."""
    tensors, text = path.suffix == '.safetensors', path.suffix == '.json'
    way = rng.random()
    if tensors and way < .5:
        changed, meta = odd_tensors(*held, rng)
        save_tensors(changed, path, meta)
        return True
    if text and way < .6:
        path.write_text(mutated_json(held, rng), encoding='utf-8', errors='surrogatepass')
    elif tensors and way < .65: path.write_bytes(_odd_header(data, rng))
    else: path.write_bytes(mutated(data, rng))
    return text

def check_reader(
    good, # A file as it is written, `.json`, `.safetensors` or another
    read, # Function (target, path): reads the file; what it gives is compared by `same`
    # Function that makes what is read into, anew after each file that is accepted; it may give the same thing again
    make=lambda: None,
    state=lambda target: None, # Function (target) -> what must not change when a file is refused; compared by `==`
    # Function (result) -> what must be equal to that of the good file, where a file that is only damaged is
    # accepted
    same=None,
    count=COUNT, # How many mutations
    seed=0, # Of the mutations
)->dict: # How many were `refused`, and `accepted`
    """Read damaged and forged copies of a file: each is refused by an `OpenTransError` with nothing changed, or
    read."""
    data = good.read_bytes()
    rng = np.random.default_rng(seed)
    told = dict(refused=0, accepted=0)
    whole = same(read(make(), good)) if same else None
    target = make()
    before = state(target)
    held = {'.safetensors': lambda: load_tensors(good), '.json': lambda: json.loads(data)}.get(good.suffix, tuple)()
    for i in range(count):
        path = good.parent/f'mutated{good.suffix}'
        forged = _write(held, path, data, rng)
        try: result = read(target, path)
        except OpenTransError as error:
            told['refused'] += 1
            assert len(str(error)) < 2000, f'mutation {i} (seed {seed}): an error of {len(str(error))} characters'
            assert state(
                target) == before, f'mutation {i} (seed {seed}) was refused, but changed something: {error}'
            continue
        except Exception as error:
            pytest.fail(f'mutation {i} (seed {seed}) ends in {type(error).__name__}: {str(error)[:500]}')
        told['accepted'] += 1
        if same and not forged:
            assert same(result) == whole, f'mutation {i} (seed {seed}) is damaged, but was read as something else'
        target = make()
    path.unlink()
    assert told['refused'] > count/4, f'only {told} of {count} mutations'
    return told

def digest(*things)->str:
    """One text for the values of tensors, state dicts, modules and plain values, however nested, for `state`. The
    order in dictionaries does not matter."""
    total = hashlib.sha256()
    def add(value):
        if isinstance(value, torch.nn.Module):
            value = {**value.state_dict(), **{f'{n}?': p.requires_grad for n, p in value.named_parameters()}}
        if isinstance(value, torch.optim.Optimizer): value = value.state_dict()
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().contiguous()
            total.update(f'{value.dtype}{tuple(value.shape)}'.encode()
                         + value.flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key, held in sorted(value.items(), key=lambda item: str(item[0])):
                total.update(f'{key}:'.encode())
                add(held)
        elif isinstance(value, (list, tuple)):
            for held in value: add(held)
        else: total.update(repr(value).encode())
    for thing in things: add(thing)
    return total.hexdigest()
