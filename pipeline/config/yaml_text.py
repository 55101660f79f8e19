"""YAML as this configuration reads and writes it: numbers such as `2e-4` are numbers, a key given twice is an error."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import yaml

# PyYAML follows YAML 1.1, where a float needs a dot and a signed exponent: `2e-4` would be text.
EXPONENT_FLOAT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
FLOAT_TAG = "tag:yaml.org,2002:float"


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        repeated = sorted(key for key, count in keys.items() if count > 1)
        if repeated:
            raise yaml.constructor.ConstructorError(
                None, None, f"key given twice: {', '.join(repeated)}", node.start_mark
            )
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    pass


# Both sides know the same numbers, or a folder named `2e4` would be written without quotes and read back as 20000.
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(FLOAT_TAG, EXPONENT_FLOAT, list("-+0123456789"))


def read_yaml(text: str) -> Any:
    """Parses one document; YAMLError where it is malformed, nested too deep, or a mapping names a key twice."""
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deep") from None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        # What PyYAML makes numbers and dates with; such as `2001-99-99`, or 5,000 digits.
        raise yaml.YAMLError(f"a value cannot be read ({error})") from None


def write_yaml(value: Any) -> str:
    """Plain values as YAML that `read_yaml` gives back, keys in the order of the mappings."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
