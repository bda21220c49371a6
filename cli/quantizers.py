"""`kvq quantizers`."""

from . import options, output


def quantizers(json: options.Json = False) -> None:
    """List the quantizers: the name for quantizer.kind, what it is for, and its paper."""
    from kvq.quantizer_config import describe_quantizers

    described = describe_quantizers()
    if json:
        output.print_json({member.pop("kind"): member for member in described})
        return
    width = max(len(member["kind"]) for member in described)
    for member in described:
        print(f"{member['kind']:{width}}  {member['summary']} {member['paper']}")
