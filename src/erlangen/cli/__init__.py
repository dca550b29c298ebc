"""The command line: thin commands over the library.

Errors that a user can act on end in one sentence and exit status 2; ``--traceback`` shows where they came from.
"""

import os
import sys
from collections.abc import Callable, Sequence

_USAGE = """\
usage: erlangen COMMAND [options]

  tour          train small models, with symmetries broken and lived on, and write a report (about five minutes)
  train         train a language model
  evaluate      ask a language model questions with a known answer, and compare two models
  explain       which keys the preferred direction of every head favours, by chance and by cause
  bench         measure time and memory of attention between poses
  channels      what of sequences, motifs or attention maps lies in each channel of a finite group
  audit         how many dimensions of a checkpoint are redundant, and what its heads are like
  canonicalize  write a checkpoint in canonical form, with a certificate that nothing changed
  compare       whether two checkpoints are the same function, and how far apart they are
  merge         average two checkpoints in one gauge
  shrink        store and compute less: a checkpoint without the numbers that a gauge makes redundant

  erlangen COMMAND --help    options and an example
  erlangen --version
  --traceback (anywhere)     on an error, show where it came from
"""


def _tour(arguments: Sequence[str]) -> int:
    from .tour import main

    return main(arguments)


def _train(arguments: Sequence[str]) -> int:
    from .train import main

    return main(arguments)


def _evaluate(arguments: Sequence[str]) -> int:
    from .evaluate import main

    return main(arguments)


def _explain(arguments: Sequence[str]) -> int:
    from .explain import main

    return main(arguments)


def _bench(arguments: Sequence[str]) -> int:
    from .bench import main

    return main(arguments)


def _channels(arguments: Sequence[str]) -> int:
    from .channels import main

    return main(arguments)


def _audit(arguments: Sequence[str]) -> int:
    from .audit import main

    return main(arguments)


def _canonicalize(arguments: Sequence[str]) -> int:
    from .canonicalize import main

    return main(arguments)


def _compare(arguments: Sequence[str]) -> int:
    from .compare import main

    return main(arguments)


def _merge(arguments: Sequence[str]) -> int:
    from .merge import main

    return main(arguments)


def _shrink(arguments: Sequence[str]) -> int:
    from .shrink import main

    return main(arguments)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "tour": _tour,
    "train": _train,
    "bench": _bench,
    "channels": _channels,
    "audit": _audit,
    "canonicalize": _canonicalize,
    "compare": _compare,
    "merge": _merge,
    "shrink": _shrink,
    "evaluate": _evaluate,
    "explain": _explain,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    traceback = "--traceback" in arguments
    if traceback:
        arguments.remove("--traceback")
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(_USAGE, end="")
        return 0
    if name == "--version":
        from erlangen import __version__

        print(f"erlangen {__version__}")
        return 0
    if name not in COMMANDS:
        print(f"erlangen: there is no command {name!r}: choose {' or '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return COMMANDS[name](arguments[1:])
    except KeyboardInterrupt:
        print("erlangen: stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if traceback:
            raise
        if int(os.environ.get("RANK", 0)) == 0:
            text = " ".join(str(error).split())
            print(f"erlangen {name}: {text or type(error).__name__}", file=sys.stderr)
        return 2
