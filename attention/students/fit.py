"""Whether a student fits a model, and the module that runs what its sites learned."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..hosts.base import Site
from ..kinds.feature_maps import Favor, FeatureMap, Maps
from ..kinds.kind import Learned
from ..plans import describe_sites
from ..shown import one_line, quote
from ..specs import DenseSpec, SiteSpec, groups_of
from .file import PARAMETER, SHAPES, StudentFile
from .learned import StudentParameters, empty_maps, map_shapes
from .tensor_values import below


def check_student(student: StudentFile, host_name: str, sites: Sequence[Site]) -> dict[str, SiteSpec]:
    """Return the spec of each site of a model, after checking that the student fits it.

    A site with pooled tokens and no `<site>.pool` averages uniformly; one of kind foveated without `<site>.bias` or
    `<site>.pool_logits` runs without.

    Args:
        student: as loaded.
        host_name: of the model.
        sites: of the model.

    Raises:
        ValueError: the student is for another host, its plan names a site or a number of heads that the model does
            not have, or a parameter belongs to no site, to a kind without such parameters, or has another shape.
    """
    if student.host != host_name:
        raise ValueError(f"the student is for host {quote(student.host)}, this model is {quote(host_name)}")
    ids = [site.id for site in sites]
    try:
        specs = student.plan.resolve(ids)
    except ValueError as error:
        base = one_line(student.base_model, 200) if student.base_model else "another model of this architecture"
        raise ValueError(f"the student was made for {base}: {error}") from None
    for site in sites:
        try:
            groups_of(specs[site.id], site.num_heads)
        except ValueError as error:
            raise ValueError(f"the student does not fit {site.id}: {error}") from None
    for name, tensor in student.parameters.items():
        found = PARAMETER.fullmatch(name)
        if found is None or found["site"] not in specs:
            raise ValueError(f"the student has {quote(name)}, this model has only {describe_sites(ids)}")
        site = next(each for each in sites if each.id == found["site"])
        _check_part(name, found["part"], tensor, specs[site.id], site)
    for site in sites:
        _check_maps(student, site, specs[site.id])
    return specs


def student_parameters(student: StudentFile, specs: Mapping[str, SiteSpec], sites: Sequence[Site]) -> StudentParameters:
    """Return what the sites of a model learned.

    Args:
        student: that fits the model.
        specs: as `check_student` returned them.
        sites: of the model.
    """
    maps, given = student_maps(student, specs, sites), student.parameters
    names = {"pool": "pool", "output": "output.weight", "bias": "bias", "pool_logits": "pool_logits"}
    return StudentParameters(
        {
            site: Learned(maps=maps.get(site), **{field: given.get(f"{site}.{name}") for field, name in names.items()})
            for site in specs
        }
    )


def student_maps(student: StudentFile, specs: Mapping[str, SiteSpec], sites: Sequence[Site]) -> dict[str, Maps]:
    """Return phi_q and phi_k of every site whose kind has feature maps, with the student's parameters."""
    found: dict[str, Maps] = {}
    shared: dict[tuple[SiteSpec, int], Maps] = {}  # maps without parameters are drawn, which takes its time
    for site in sites:
        spec = specs[site.id]
        if not spec.has_maps:
            continue
        shapes = map_shapes(spec, site.num_heads, site.head_dim)
        maps = None if shapes else shared.get((spec, site.head_dim))
        if maps is None:
            maps = shared[spec, site.head_dim] = empty_maps(spec, site.num_heads, site.head_dim)
            for feature_map in maps:
                if isinstance(feature_map, Favor):
                    feature_map.take_draw(student.draw)
        found[site.id] = maps
        for part, feature_map in zip(("phi_q", "phi_k"), maps, strict=True):
            _fill(feature_map, f"{site.id}.{part}.", student.parameters)
    return found


def _check_maps(student: StudentFile, site: Site, spec: SiteSpec) -> None:
    """Check that a student holds the parameters of a site's maps; no memory is taken, whatever size they ask for."""
    if not spec.has_maps:
        return
    try:
        shapes = map_shapes(spec, site.num_heads, site.head_dim)
    except ValueError as error:
        raise ValueError(f"the student does not fit {site.id}: {error}") from None
    for part in ("phi_q", "phi_k"):
        _check_shapes(spec.feature_map, shapes, f"{site.id}.{part}.", student.parameters)


def _check_shapes(name: str, needed: Mapping[str, tuple[int, ...]], prefix: str, tensors: Mapping[str, Tensor]) -> None:
    given = below(prefix, tensors)
    if given.keys() != needed.keys():
        strange = sorted(given.keys() ^ needed.keys())[0]
        what = "lacks" if strange in needed else "has"
        raise ValueError(
            f"the student {what} {quote(prefix + strange)}; feature map {name} has"
            f" {', '.join(needed) or 'no parameters'}"
        )
    for each, shape in needed.items():
        if tuple(given[each].shape) != shape:
            raise ValueError(
                f"{quote(prefix + each)} has shape {quote(tuple(given[each].shape))}, the site has {shape}"
            )


def _fill(feature_map: FeatureMap, prefix: str, tensors: Mapping[str, Tensor]) -> None:
    given = below(prefix, tensors)
    for name, parameter in feature_map.named_parameters():
        parameter.data = given[name].detach()


def _check_part(name: str, part: str, tensor: Tensor, spec: SiteSpec, site: Site) -> None:
    if part == "output.weight":
        needed = (site.num_heads, site.head_dim, site.head_dim)
        if spec == DenseSpec() or tuple(tensor.shape) != needed:
            raise ValueError(
                f"{quote(name)} has shape {quote(tuple(tensor.shape))}, the site takes {needed} if it is not dense"
            )
        return
    if part in SHAPES:
        shapes = [each.learned_shapes(site.num_heads) for each in spec.parts]
        taken = sorted({each[part] for each in shapes if part in each})
        if not taken:
            raise ValueError(f"the student has {quote(name)}, its plan takes no {part} at that site")
        if taken != [tuple(tensor.shape)]:
            raise ValueError(
                f"{quote(name)} has shape {quote(tuple(tensor.shape))}, the plan takes {' and '.join(map(str, taken))}"
            )
    elif not any(each.has_maps for each in spec.parts):
        raise ValueError(f"the student has {quote(name)}, its plan has no feature map at that site")
