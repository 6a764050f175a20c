"""How readable are the lines? Counts for the package, its notebooks, tests and benchmarks, module by module.

python benchmarks/measure_style.py                      tables of this checkout
python benchmarks/measure_style.py --json style.json    the counts as JSON, too
python benchmarks/measure_style.py --before old.json    beside earlier counts
python benchmarks/measure_style.py --root FOLDER        another project of the same layout

Only the standard library is needed, so that any checkout of any age can be measured.
"""
import argparse
import ast
import io
import json
import re
import statistics
import subprocess
import tokenize
from pathlib import Path

AMBIGUOUS = {'l', 'O', 'I'}
GROUPS = dict(package='opentrans/**/*.py', notebooks='nbs/**/*.ipynb', tests='tests/*.py',
              benchmarks='benchmarks/*.py')
SKIPPED = {'_modidx.py', '.ipynb_checkpoints'}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

COLUMNS = dict(lines='lines', over_120='>120', over_120_percent='>120 %', over_150_percent='>150 %',
               longest='longest', semicolons=';', bound_lambdas='lambda=', ambiguous='E741',
               nested_ternaries='a if b if', tuple_assignments='a,b,c=', nodes_a_statement='nodes/stmt',
               nodes_p99='p99', one_letter_percent='1-letter %', patches='@patch',
               annotated_percent='annotated %', annotated_all_percent='with private %',
               function_median='def median', function_p99='def p99',
               function_longest='def max', cell_median='cell median', cell_p90='cell p90',
               cell_longest='cell max')


def sources(path):
    "The pieces of Python in a file: the file itself, or the code cells of a notebook without magics."
    text = path.read_text(encoding='utf-8')
    if path.suffix != '.ipynb':
        return [text]
    cells = [''.join(cell['source']) for cell in json.loads(text)['cells'] if cell['cell_type'] == 'code']
    return [without_magics(cell) for cell in cells]


def without_magics(cell):
    "A cell whose lines for IPython are empty, so that it parses; the numbers of its lines stay."
    lines = [('' if line.lstrip().startswith(('%', '!')) else line) for line in cell.split('\n')]
    return '\n'.join(lines)


def tokens(source):
    return list(tokenize.generate_tokens(io.StringIO(source).readline))


def own_nodes(statement):
    "Nodes of the syntax tree below a statement, without those of the statements inside it."
    found, waiting = [], [statement]
    while waiting:
        inner = [child for child in ast.iter_child_nodes(waiting.pop()) if not isinstance(child, ast.stmt)]
        found += inner
        waiting += inner
    return found


def local_names(function):
    "Names that a function binds, without its arguments and without those of functions inside it."
    names, waiting = set(), list(function.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id != '_':
            names.add(node.id)
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            waiting += ast.iter_child_nodes(node)
    return names


def arguments(function):
    "The named arguments of a function, without self and cls."
    spec = function.args
    named = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs]
    return [arg for arg in named if arg.arg not in ('self', 'cls')]


def decorator_name(node):
    node = node.func if isinstance(node, ast.Call) else node
    return getattr(node, 'id', getattr(node, 'attr', ''))


def is_public(name):
    return not name.startswith('_') or name == '__init__'


def public_functions(tree):
    "Public functions of a module and public methods of its public classes."
    for node in tree.body:
        if isinstance(node, FUNCTIONS) and is_public(node.name):
            yield node
        elif isinstance(node, ast.ClassDef) and is_public(node.name):
            yield from (f for f in node.body if isinstance(f, FUNCTIONS) and is_public(f.name))


def binds_lambda(statement):
    if not isinstance(statement, ast.Assign):
        return False
    values = statement.value.elts if isinstance(statement.value, ast.Tuple) else [statement.value]
    return any(isinstance(value, ast.Lambda) for value in values)


def binds_many(statement):
    "Three or more values for three or more targets in one statement."
    if not isinstance(statement, ast.Assign) or not isinstance(statement.value, ast.Tuple):
        return False
    return isinstance(statement.targets[0], ast.Tuple) and len(statement.value.elts) > 2


def is_nested(node):
    "A conditional expression inside another one."
    if not isinstance(node, ast.IfExp):
        return False
    inner = (sub for part in (node.test, node.body, node.orelse) for sub in ast.walk(part))
    return any(isinstance(sub, ast.IfExp) for sub in inner)


def ambiguous_names(tree):
    "Bindings of l, O or I (E741)."
    bound = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    bound += [node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)]
    return sum(name in AMBIGUOUS for name in bound)


def code_lines(source):
    "Lines of a cell that hold code: neither empty, nor a directive, nor a comment alone."
    return [line for line in source.split('\n') if line.strip() and not line.lstrip().startswith('#')]


def is_export(source):
    return any(line.replace(' ', '').startswith('#|export') for line in source.split('\n'))


def measure(source):
    "Raw counts of one piece of Python; lists are joined over a file before they are summed up."
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    statements = [node for node in nodes if isinstance(node, ast.stmt)]
    functions = [node for node in nodes if isinstance(node, FUNCTIONS)]
    names = [name for function in functions for name in local_names(function)]
    public = [arg for function in public_functions(tree) for arg in arguments(function)]
    every = [arg for function in functions for arg in arguments(function)]
    decorators = [decorator_name(d) for f in functions for d in f.decorator_list]
    return dict(
        widths=[len(line) for line in source.split('\n') if line.strip()],
        semicolons=sum(t.type == tokenize.OP and t.string == ';' for t in tokens(source)),
        bound_lambdas=sum(map(binds_lambda, statements)),
        tuple_assignments=sum(map(binds_many, statements)),
        nested_ternaries=sum(map(is_nested, nodes)),
        ambiguous=ambiguous_names(tree),
        nodes=[len(own_nodes(statement)) for statement in statements],
        names=len(names),
        one_letter=sum(len(name) == 1 for name in names),
        patches=decorators.count('patch'),
        public=[arg.annotation is not None for arg in public],
        every=[arg.annotation is not None for arg in every],
        functions=[function.end_lineno - function.lineno + 1 for function in functions],
        cells=[len(code_lines(source))] if is_export(source) else [])


def joined(counts):
    "The sum of raw counts: numbers are added, lists are strung together."
    total = {}
    for count in counts:
        for key, value in count.items():
            total[key] = total[key] + value if key in total else value
    return total


def quantile(values, share):
    "The value below which a share of all lies; 0 of none."
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0


def percent(part, whole):
    return round(100 * part / whole, 1) if whole else 0.


def mean(values):
    return round(statistics.mean(values), 1) if values else 0.


def median(values):
    return statistics.median(values) if values else 0


def summary(raw):
    "The figures of the table from raw counts."
    widths = raw['widths']
    counted = ('semicolons', 'bound_lambdas', 'ambiguous', 'nested_ternaries', 'tuple_assignments', 'patches')
    over_120 = sum(width > 120 for width in widths)
    return dict(
        lines=len(widths), over_120=over_120, over_120_percent=percent(over_120, len(widths)),
        over_150_percent=percent(sum(width > 150 for width in widths), len(widths)),
        longest=max(widths, default=0), **{key: raw[key] for key in counted},
        nodes_a_statement=mean(raw['nodes']), nodes_p99=quantile(raw['nodes'], .99),
        one_letter_percent=percent(raw['one_letter'], raw['names']),
        annotated_percent=percent(sum(raw['public']), len(raw['public'])),
        annotated_all_percent=percent(sum(raw['every']), len(raw['every'])),
        functions=len(raw['functions']), function_median=median(raw['functions']),
        function_p99=quantile(raw['functions'], .99), function_longest=max(raw['functions'], default=0),
        cell_median=median(raw['cells']), cell_p90=quantile(raw['cells'], .9),
        cell_longest=max(raw['cells'], default=0),
        cells_over_25=sum(lines > 25 for lines in raw['cells']), cells=len(raw['cells']))


def measured(path):
    "Raw counts of a file: those of its pieces, together."
    return joined([measure(source) for source in sources(path)] or [measure('')])


def files(root, pattern):
    return [path for path in sorted(root.glob(pattern)) if not SKIPPED.intersection(path.parts)]


def commit(root):
    "The revision that is measured; empty outside of git."
    asked = ['git', '-C', str(root), 'rev-parse', '--short', 'HEAD']
    return subprocess.run(asked, capture_output=True, text=True).stdout.strip()


def report(root):
    "All figures: each file of each group, and each group in total."
    groups = {}
    for group, pattern in GROUPS.items():
        raw = {str(path.relative_to(root)): measured(path) for path in files(root, pattern)}
        if raw:
            per_file = {name: summary(counts) for name, counts in raw.items()}
            groups[group] = dict(total=summary(joined(raw.values())), files=per_file)
    return dict(commit=commit(root), groups=groups)


def table(rows):
    "Rows of figures as lines of text, one a name."
    width = max(map(len, rows))
    heads = [f'{title:>{max(6, len(title))}}' for title in COLUMNS.values()]
    lines = [' ' * width + ' ' + ' '.join(heads)]
    for name, figures in rows.items():
        cells = [f'{figures[key]:>{len(head)}}' for key, head in zip(COLUMNS, heads, strict=True)]
        lines.append(f'{name:<{width}} ' + ' '.join(cells))
    return '\n'.join(lines)


def totals(found, label=''):
    return {f'{group}{label}': parts['total'] for group, parts in found['groups'].items()}


def as_json(found):
    "The report as JSON, a file a line."
    text = json.dumps(found, indent=1)
    inner = r"\{([^{}]*)\}"
    return re.sub(inner, lambda found: "{" + re.sub(r"\n *", " ", found[1]).strip() + "}", text) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--root', type=Path, default=Path(__file__).resolve().parent.parent)
    parser.add_argument('--json', type=Path, help='where to write the counts')
    parser.add_argument('--before', type=Path, help='counts of another time, shown beside these')
    parser.add_argument('--files', action='store_true', help='a row for each file, too')
    options = parser.parse_args()
    found = report(options.root)
    if options.json:
        options.json.write_text(as_json(found), encoding='utf-8')
    if options.files:
        for group, parts in found['groups'].items():
            print(f"\n{group}\n{table(parts['files'])}")
    rows = totals(found)
    if options.before:
        earlier = json.loads(options.before.read_text(encoding='utf-8'))
        rows = {**totals(earlier, ', before'), **rows}
    print(f"\ntotals\n{table({name: rows[name] for name in sorted(rows)})}")
    return found


if __name__ == '__main__':
    main()
