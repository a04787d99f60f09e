"""Published methods, one file each: objective, head, tower, field or planner together, with their source.

They use public names alone, as a user's own file would. `clipjax methods` lists them.
"""
