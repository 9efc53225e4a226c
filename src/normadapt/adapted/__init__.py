"""What a user holds: `adapt`, `AdaptedModel`, its streams and the rule `Domains`. One batch's way is in `forward`."""
