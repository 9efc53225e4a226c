"""What a user holds: `adapt`, `AdaptedModel`, its streams and the rule `Domains`. The way of one batch is in `forward`."""
