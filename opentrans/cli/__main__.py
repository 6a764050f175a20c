"`python -m opentrans.cli` is the command `opentrans`."
from opentrans.cli import run_command

if __name__ == '__main__': run_command()
