"""The subcommands of `ds-remoe`, one file a subject: each has its parser (`add_name`) and what it runs (`name`)."""
