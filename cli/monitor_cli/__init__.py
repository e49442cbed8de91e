"""The command line ``monitor``: one file per command. Imports the library, and never the dashboard."""
