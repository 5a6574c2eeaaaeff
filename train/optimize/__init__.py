"""Update rules, schedules and what goes with them."""
