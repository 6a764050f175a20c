"""Builds the documentation site from the notebooks, without quarto: `make docs`.

    python docs/site.py [--out _docs] [--only 02_heavy_tail,...]

Pages, their order and their titles are those of `_quarto.yml`. A cell that is exported becomes a table of parameters
for each public function and class that it defines, with its code folded below; `#| hide` cells are left out; other
cells are shown with the outputs that the notebook holds. Nothing is executed and nothing is fetched.
"""
import argparse, ast, base64, importlib, inspect, os, re, shutil, subprocess, sys, tempfile
from pathlib import Path
import latex2mathml.converter, nbformat, yaml
from opentrans.helping import described

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'

# ---------------------------------------------------------------- what a public name is

def only_imports(source):
    "Does a cell do nothing but import?"
    return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(source).body)

def patched_class(function):
    "The class that a cell's `@patch` gives a method to, or None."
    patched = any('patch' in ast.unparse(line) for line in function.decorator_list)
    first = function.args.args[:1]
    return ast.unparse(first[0].annotation) if patched and first and first[0].annotation else None

def public_owner(module, made):
    "The name of the public class that a class of a cell is, or is joined into; None for one that nobody sees."
    if not made.__name__.startswith('_'): return made.__name__
    heirs = [name for name,found in vars(module).items()
             if isinstance(found, type) and made in found.__mro__ and not name.startswith('_')]
    return heirs[0] if heirs else None

def methods_of(module, node):
    "(title, method) of each public method of a class that says what it does."
    made = getattr(module, node.name, None)
    owner = public_owner(module, made) if isinstance(made, type) else None
    named = [part.name for part in node.body if isinstance(part, ast.FunctionDef) and ast.get_docstring(part)]
    found = {name: getattr(made, name) for name in named if not name.startswith('_')} if owner else {}
    return [(f'{owner}.{name}', method) for name,method in found.items() if callable(method)]

def find_symbols(module, source):
    "(title, object) of each public function and class of a cell, and of each of their methods."
    found = []
    for node in ast.parse(source).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)): continue
        owner = patched_class(node) if isinstance(node, ast.FunctionDef) else None
        holder = getattr(module, owner, None) if owner else module
        symbol = None if node.name.startswith('_') else getattr(holder, node.name, None)
        if symbol is not None: found.append((f'{owner}.{node.name}' if owner else node.name, symbol))
        if isinstance(node, ast.ClassDef): found += methods_of(module, node)
    return found

def as_cell(text):
    "Text inside a cell of a Markdown table."
    return str(text).replace('|', '\\|').replace('\n', ' ')

def parameter_table(symbol):
    "A Markdown table of the parameters of a function or class, or an empty text."
    params,given = described(inspect.unwrap(getattr(symbol, '__func__', symbol)))
    rows = [parameter_row(f"`{param.name}{code_of(': ', param.kind)}{code_of(' = ', param.default)}`", param)
            for param in params]
    if given is not None and (given.meaning or given.kind not in ('', 'None')):
        rows.append(parameter_row(f'*returns* `{given.kind}`' if given.kind else '*returns*', given))
    return '\n'.join(['| parameter | meaning |', '|---|---|', *rows]) if rows else ''

def code_of(sign, text): return sign + text if text else ''

def parameter_row(words, param): return f'| {as_cell(words)} | {as_cell(param.meaning)} |'

def signature(symbol):
    "Names of a function's parameters with their defaults."
    try: parameters = inspect.signature(symbol).parameters.values()
    except (TypeError, ValueError): return '(...)'
    shown = [str(p.replace(annotation=inspect.Parameter.empty)) for p in parameters if p.name not in ('self', 'cls')]
    text = f"({', '.join(shown)})"
    return text if len(text) < 400 else f"({', '.join(p.name for p in parameters)})"

def symbol_docs(title, symbol):
    "Heading, signature, first words and parameters of a public name."
    words = re.split(r'\n\n(?:Parameters|Returns|Example)\n-', inspect.getdoc(symbol) or '')[0] # the table has the rest
    heading = f'### `{title}` {{ #{title} data-toc-label="{title}" }}'
    call = f'```python\n{title}{signature(symbol)}\n```'
    return '\n\n'.join(part for part in (heading, call, words, parameter_table(symbol)) if part)

# ---------------------------------------------------------------- cells

def directives(source):
    "The words behind `#|` at the beginning of a cell."
    return [line[2:].strip() for line in source.splitlines() if line.startswith('#|')]

def without_directives(source):
    kept = [line for line in source.splitlines() if not line.startswith('#|')]
    return '\n'.join(kept).strip()

def fenced(text, language=''):
    "A block of code; the fence is longer than any inside."
    longest = max((len(run) for run in re.findall(r'`{3,}', text)), default=2)
    fence = '`'*(longest+1)
    return f'{fence}{language}\n{text.rstrip()}\n{fence}'

def folded(title, text):
    "A block that is shown when its title is clicked."
    lines = text.splitlines()
    return '\n'.join([f'??? note "{title}"', '', *(f'    {line}' if line else '' for line in lines)])

class Page:
    "A notebook on its way to Markdown."
    def __init__(self, notebook, target):
        self.notebook, self.target = notebook, target
        self.pictures = 0
        self.module = None

    def write(self):
        book = nbformat.read(self.notebook, 4)
        parts = [self.cell(cell) for cell in book.cells]
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.target.write_text('\n\n'.join(part for part in parts if part) + '\n', encoding='utf-8')

    def cell(self, cell):
        "The Markdown of a cell; an empty text if it is not shown."
        if cell.cell_type == 'markdown': return relink(cell.source)
        told = directives(cell.source)
        source = without_directives(cell.source)
        module = next((line.split()[1] for line in told if line.startswith('default_exp')), None)
        if module: self.module = importlib.import_module(f'opentrans.{module}')
        if module or 'hide' in told or not source: return ''
        if 'export' in told or 'exports' in told: return self.exported(source)
        hidden = 'echo: false' in told or 'show_doc(' in source
        shown = [] if hidden else [fenced(source, 'python')]
        return '\n\n'.join([*shown, *(self.output(output) for output in cell.outputs)])

    def exported(self, source):
        "What is said of the public names of a cell, and its code, folded."
        symbols = [] if self.module is None else find_symbols(self.module, source)
        if only_imports(source): return ''
        told = [symbol_docs(title, symbol) for title, symbol in symbols]
        title = ', '.join(title for title, _ in symbols) or 'code'
        return '\n\n'.join([*told, folded(f'Source: {title}', fenced(source, 'python'))])

    def output(self, output):
        "The Markdown of an output."
        if output.output_type == 'stream': return fenced(strip_colours(output.text), 'text')
        if output.output_type == 'error': return fenced(f'{output.ename}: {strip_colours(output.evalue)}', 'text')
        data = output.data
        if 'image/png' in data: return self.picture(data['image/png'])
        if 'text/html' in data: return f"<div class=\"output\">\n{one_block(data['text/html'])}\n</div>"
        if 'text/markdown' in data: return relink(data['text/markdown'])
        return fenced(strip_colours(data.get('text/plain', '')), 'text') if 'text/plain' in data else ''

    def picture(self, encoded):
        "Write a picture beside the page."
        self.pictures += 1
        path = self.target.with_name(f'{self.target.stem}-{self.pictures}.png')
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(encoded))
        return f'![]({path.name})'

def strip_colours(text): return re.sub(r'\x1b\[[0-9;]*m', '', text)

def one_block(text):
    "HTML without empty lines and without styles of its own, which Markdown would cut or repeat."
    text = re.sub(r'<style.*?</style>', '', text, flags=re.S)
    return '\n'.join(line for line in text.splitlines() if line.strip())

def formulas(text):
    "Formulas between dollar signs become MathML, which browsers draw without a script. Code stays as it is."
    def drawn(found):
        display = 'block' if found[0].startswith('$$') else 'inline'
        return latex2mathml.converter.convert(found[1] or found[2], display=display)
    parts = re.split(r'(```.*?```|`[^`\n]*`)', text, flags=re.S)
    pattern = r'\$\$(.+?)\$\$|(?<![\\\w$])\$(?=\S)([^$\n]+?)(?<=\S)\$(?![\w$])'
    return ''.join(part if i % 2 else re.sub(pattern, drawn, part, flags=re.S) for i, part in enumerate(parts))

def relink(text):
    "Formulas are drawn, and links between notebooks become links between pages."
    text = formulas(text)
    return re.sub(r'(\]\([^)\s]+?)\.ipynb(#[^)]*)?\)', r'\1.md\2)', text)

# ---------------------------------------------------------------- the site

def title_of(notebook):
    "The heading of a notebook."
    for cell in nbformat.read(notebook, 4).cells:
        found = re.search(r'^# (.+)$', cell.source, re.M) if cell.cell_type == 'markdown' else None
        if found: return found[1].replace('`', '')
    return notebook.stem

def navigation(contents, chosen):
    "The tree of pages as mkdocs wants it, from the sidebar of `_quarto.yml`."
    tree = []
    for entry in contents:
        if isinstance(entry, dict):
            inside = navigation(entry['contents'], chosen)
            if inside: tree.append({entry['section']: inside})
            continue
        path = ROOT/entry
        if chosen and path.stem not in chosen: continue
        tree.append({title_of(path): str(path.relative_to(NBS).with_suffix('.md'))})
    return tree

def pages(tree):
    "Paths of all pages of a tree."
    for entry in tree:
        for value in entry.values():
            if isinstance(value, list): yield from pages(value)
            else: yield Path(value)

STYLE = """
.md-grid { max-width: 76rem; }
.output { overflow-x: auto; }
.output table, .md-typeset table:not([class]) { font-size: .68rem; }
.md-typeset img { max-width: 100%; background: #fff; }
"""

def configuration(site, tree, source, out):
    "What mkdocs reads. No fonts and no scripts of other hosts."
    extensions = ['admonition', 'attr_list', 'md_in_html', 'tables', 'pymdownx.details', 'pymdownx.superfences',
                  {'pymdownx.highlight': dict(anchor_linenums=False)}, {'toc': dict(permalink=True, toc_depth=3)}]
    theme = dict(name='material', font=False, features=['navigation.sections', 'search.highlight', 'content.code.copy',
                                                        'navigation.footer', 'toc.follow'])
    return dict(site_name=site['title'], site_description=site['description'], site_url=site['site-url'],
                repo_url=site['repo-url'], docs_dir=str(source), site_dir=str(out), theme=theme, nav=tree,
                plugins=['search'], markdown_extensions=extensions, extra_css=['opentrans.css'],
                validation=dict(links=dict(not_found='warn', unrecognized_links='ignore', anchors='ignore')))

def check_links(source):
    "Links of pages that lead to no page: a list of sentences."
    wrong = []
    for page in source.rglob('*.md'):
        for link in re.findall(r'\]\(([^)\s#]+\.md)(?:#[^)]*)?\)', page.read_text(encoding='utf-8')):
            if not link.startswith('http') and not (page.parent/link).resolve().exists():
                wrong.append(f'{page.relative_to(source)} leads to {link}, which is no page')
    return wrong

def build(out, chosen=()):
    "Write the site into a folder."
    site = yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))['website']
    tree = navigation(site['sidebar']['contents'], chosen)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)/'pages'
        for path in pages(tree): Page(NBS/path.with_suffix('.ipynb'), source/path).write()
        shutil.copytree(ROOT/'docs'/'results', source/'docs'/'results')
        (source/'opentrans.css').write_text(STYLE, encoding='utf-8')
        wrong = [] if chosen else check_links(source)
        if wrong: sys.exit('\n'.join(wrong))
        config = Path(folder)/'mkdocs.yml'
        config.write_text(yaml.safe_dump(configuration(site, tree, source, out), sort_keys=False), encoding='utf-8')
        command = [sys.executable, '-m', 'mkdocs', 'build', '--quiet', '--config-file', str(config)]
        subprocess.run(command, check=True, env=dict(os.environ, NO_MKDOCS_2_WARNING='1'))

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=ROOT/'_docs', help='folder of the site')
    parser.add_argument('--only', default='', help='names of pages, with commas; default: all')
    told = parser.parse_args()
    build(told.out.resolve(), tuple(name for name in told.only.split(',') if name))
    print(f'{told.out/"index.html"}')

if __name__ == '__main__': main()
