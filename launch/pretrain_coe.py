"""Pretrains a Chain-of-Experts model.

    torchrun --nproc-per-node 2 launch/pretrain_coe.py CONFIG.yaml [key.sub=value ...]

Run again with the same config, it goes on from its newest checkpoint. Exit status: 0 done, 2 a mistake in the config or
the data (one line on stderr says which), 130 interrupted from the keyboard, 1 anything else.
"""

import argparse
import os
import sys

from coe_megatron.config import ConfigError, RunConfig, load


def main(arguments: list[str] | None = None) -> int:
    """Parse, check, train; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file, such as configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", help="key.sub=value, which wins over the file")
    options = parser.parse_args(arguments)
    main_rank = os.environ.get("RANK", "0") == "0"
    try:
        return _pretrain(load(options.config, options.overrides, int(os.environ.get("WORLD_SIZE", "1"))))
    except ConfigError as error:
        if main_rank:
            print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if main_rank:
            print("interrupted: the same command goes on from the newest checkpoint", file=sys.stderr)
        return 130


def _pretrain(config: RunConfig) -> int:
    # Imported here: the stack takes seconds, and a mistake in the config should not.
    from coe_megatron.training.console import quiet_libraries

    quiet_libraries()
    from coe_megatron.parallel.groups import Ranks
    from coe_megatron.training.loop import train

    outcome = train(config, Ranks.from_environment(os.environ))
    if outcome is not None:
        print(outcome.summary())
    return 0


if __name__ == "__main__":
    sys.exit(main())
