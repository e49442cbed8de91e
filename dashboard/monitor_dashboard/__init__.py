"""The dashboard: the same verdict, incidents and series as the command line, in the browser, live."""
