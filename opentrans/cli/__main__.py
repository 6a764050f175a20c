"`python -m opentrans.cli` is the command `opentrans`."
from opentrans.cli import main

if __name__ == '__main__': main()
