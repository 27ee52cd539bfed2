"""Storage: trials and shared data of a study, in memory, a file or a database, for all workers of the study.

`study_store` is the way in, for the search's run and study, its report and the command line. A study's name and URL
become an open storage in `open`; of the search, this package imports only `space`.
"""
