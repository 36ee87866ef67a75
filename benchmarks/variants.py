"""`python -m benchmarks.variants NAME serve …`: the service, other than it is in one point."""

import sys

from benchmarks import old_way

VARIANTS = {
    "no-event": old_way.no_event,
    "call-inside": old_way.call_inside,
    "call-after": old_way.call_after,
}


if __name__ == "__main__":
    VARIANTS[sys.argv.pop(1)]()

    from reservation_service.__main__ import main

    main()
