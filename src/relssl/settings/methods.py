"""The methods by name, and what each needs: its base recipe says it, `recipes/_NAME.yaml`; the method itself is `method/NAME.py`."""

from dataclasses import replace

from pydantic.dataclasses import dataclass

from relssl.errors import ConfigError
from relssl.settings import parts, recipes
from relssl.settings.reading import STRICT, build


@dataclass(frozen=True, config=STRICT)
class Traits:
    """The nature of a method, and its needs."""

    about: str = "a method of its own"
    title: str = ""  # in the literature
    paper: str = ""
    teacher: bool = False  # a momentum teacher follows the student
    memory: bool = False  # past keys are kept
    sharpened: bool = False  # a teacher's relation is matched, which has to be sharper than the student's
    two_way: bool | None = False  # student, and teacher if any, see both views; None: if `method.symmetric` says so
    predictor: bool = False  # cannot do without `encoder.predictor`
    tiled: bool = False  # its loss over the memory can be computed in tiles
    labels: bool = False  # trains on labels
    relational: bool = False  # has the options `method.relation` and `method.sinkhorn_iterations`
    whole_batch: bool = False  # compares the samples of a batch, which cannot be computed in parts


METHODS: dict[str, Traits] = {name: build(Traits, raw) for name, raw in recipes.traits().items()}


def traits_of(name: str) -> Traits:
    """Return the traits of a method. Those of the user's own: its `traits`, else those of the method here that it is made from, else as its
    teacher says; of one that is not at hand, with which no run goes on, the default ones with a teacher."""
    if not parts.is_part(name):
        return METHODS[name]
    try:
        kind = parts.find("method.name", name)
    except ConfigError:
        if not parts.is_handed(name):
            raise
        return Traits(title=parts.title(name), teacher=True)
    above = [f"{each.__module__}.{each.__qualname__}" for each in getattr(kind, "__mro__", ())]
    if "relssl.method.base.Method" not in above:
        raise ConfigError(f"method.name: {parts.title(name)} is no subclass of relssl.method.base.Method")
    if isinstance(traits := getattr(kind, "traits", None), Traits):
        return traits
    bases = [METHODS[stem] for each in above if (stem := each.split(".")[-2]) in METHODS and each.startswith("relssl.method.")]
    base = bases[0] if bases else Traits(teacher=kind.has_teacher, memory=kind.has_teacher)
    about = next(iter((kind.__doc__ or "").strip().splitlines()), Traits.about)
    return replace(base, about=about, title=kind.__qualname__, paper="")
