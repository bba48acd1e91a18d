"""Arrays to images, charts and pages. It knows neither runs nor stores."""
